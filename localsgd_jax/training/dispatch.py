"""Compiled programs of a run, and the results of their dispatches."""

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from localsgd_jax.analysis.device_bytes import ByteRange, DeviceBytes
from localsgd_jax.core.metrics import metric_objects, metrics_by_name, rule_metrics
from localsgd_jax.core.types import Cluster, PyTree, State
from localsgd_jax.distributed import arrays
from localsgd_jax.execution.cyclic_round import RoundClass
from localsgd_jax.execution.rounds import sync_in_class
from localsgd_jax.training.byte_counter import BestEffort
from localsgd_jax.training.columns import check_column_names
from localsgd_jax.training.round_programs import RoundPrograms
from localsgd_jax.training.round_weights import RoundTotals, RoundWeights, Weights
from localsgd_jax.training.segments import Segment

# Programs of runs that are kept for the next call of `train`.
_NUM_DISPATCHERS = 4


class DispatchResult(NamedTuple):
    """Metrics of the local steps of a dispatch.

    Attributes:
      due: for each step, whether workers synchronised after it.
      metrics: metrics of the training step by name, `(H, K)`.
      rule_metrics: metrics of the synchronisation rules after each step, `(H,)`; none
        if workers did not synchronise.
      device_bytes: bytes that a device sends in a synchronisation, or None.
      objects: metric objects of the training step by name, leaves `(H, K, ...)`.
    """

    due: tuple[bool, ...]
    metrics: Mapping[str, Any]
    rule_metrics: Mapping[str, Any]
    device_bytes: ByteRange | None
    objects: Mapping[str, Any] = MappingProxyType({})

    def wait(self) -> None:
        """Blocks until the dispatch is done."""
        jax.block_until_ready((self.metrics, self.rule_metrics, dict(self.objects)))

    def to_host(self) -> "DispatchResult":
        """Blocks until the dispatch is done and copies the metrics to NumPy.

        If the metrics span several processes, this is a collective.
        """
        metrics, rule_values, objects = arrays.to_host(
            (self.metrics, self.rule_metrics, dict(self.objects))
        )
        return self._replace(metrics=metrics, rule_metrics=rule_values, objects=objects)


class Dispatcher:
    """Compiled programs of a run: local steps, whole rounds and a synchronisation.

    Attributes:
      round_programs: choice of the program of each round.
    """

    def __init__(
        self, cluster: Cluster, weights: RoundWeights | Weights, state: State
    ) -> None:
        """Wraps the programs in `jax.jit`; compiles nothing.

        Args:
          cluster: functions of the workers.
          weights: weights of the rounds, as the argument of `train`.
          state: state before the first dispatch; only its shapes and shardings are
            read.
        """
        if not isinstance(weights, RoundWeights):
            weights = RoundWeights(weights, cluster.num_workers)
        self._weights, self._totals = weights, weights.initial_totals()
        self._device_bytes, self._best_effort = DeviceBytes(state), BestEffort()
        jit = partial(jax.jit, donate_argnums=0)
        shardings = _mesh_shardings(state)
        self._local_steps = jit(
            partial(_local_steps, cluster, weights), out_shardings=(shardings, None)
        )
        self._rounds = jit(
            partial(_rounds, cluster, weights),
            static_argnames=("period", "round_class"),
            out_shardings=(shardings, None),
        )
        self._sync = jit(
            partial(_sync, cluster, weights),
            static_argnames="round_class",
            out_shardings=shardings,
        )
        self.round_programs = RoundPrograms(self._sync, state)

    def reset(self) -> None:
        """Forgets the incomplete round of an earlier run."""
        self._totals = self._weights.initial_totals()

    def run(
        self, segment: Segment, state: State, batches: PyTree
    ) -> tuple[State, DispatchResult]:
        """Dispatches the local steps of a segment without waiting for them.

        Args:
          segment: from `segments`.
          state: state before the segment; it is donated.
          batches: on devices, leaves `(H, K, B, ...)`.

        Returns:
          The state after the segment, and the metrics, both perhaps not computed yet.
        """
        if segment.period is None:
            state, ((metrics, objects), self._totals) = self._local_steps(
                state, batches, self._totals
            )
            return state, DispatchResult(segment.due, metrics, {}, None, objects)
        static = {
            "period": segment.period,
            "round_class": self.round_programs.choose(segment.round),
        }
        rounds = sum(segment.due)
        arguments = state, batches, self._weights.given(segment.round, rounds)
        arguments += (self._totals,)
        device_bytes = self._bytes_per_round(
            self._rounds, *arguments, rounds=rounds, **static
        )
        state, ((metrics, objects), values) = self._rounds(*arguments, **static)
        self._totals = self._weights.initial_totals()
        self._best_effort.warn()
        return state, DispatchResult(
            segment.due, metrics, values, device_bytes, objects
        )

    def synchronize(
        self, state: State, round_number: int
    ) -> tuple[State, ByteRange | None]:
        """Ends an incomplete round.

        Args:
          state: state within a round; it is donated.
          round_number: number of that round, 1 for the first.

        Returns:
          The synchronised state, and the bytes that a device sends for it.
        """
        static = {"round_class": self.round_programs.choose(round_number)}
        given = self._weights.given(round_number, 1)
        arguments = state, given if given is None else given[0], self._totals
        device_bytes = self._bytes_per_round(self._sync, *arguments, rounds=1, **static)
        state = self._sync(*arguments, **static)
        self._totals = self._weights.initial_totals()
        self._best_effort.warn()
        return state, device_bytes

    def _bytes_per_round(self, *args: Any, **kwargs: Any) -> ByteRange | None:
        """Returns the bytes that a device sends in a round, if they are known."""
        function = self._device_bytes.bytes_per_round
        return self._best_effort(function, *args, **kwargs)


class _Signature(NamedTuple):
    """Arguments of the programs of a run, for comparison.

    Attributes:
      functions: functions of the cluster.
      weights: `RoundWeights.key`.
      structure: structure of the state.
      leaves: shape, dtype and sharding of each leaf of the state.
    """

    functions: tuple
    weights: Any
    structure: Any
    leaves: tuple

    @classmethod
    def of(cls, cluster: Cluster, weights: RoundWeights, state: State) -> "_Signature":
        """Returns the signature of the arguments of a dispatcher."""
        leaves, structure = jax.tree.flatten(state)
        forms = tuple((x.shape, x.dtype, x.sharding) for x in leaves)
        functions = (cluster.step, cluster.sync, cluster.sync_if, cluster.bytes_sent)
        return cls(functions, weights.key, structure, forms)


_last_dispatchers: OrderedDict[_Signature, Dispatcher] = OrderedDict()


def dispatcher_of(cluster: Cluster, weights: RoundWeights, state: State) -> Dispatcher:
    """Returns the programs of a run, and keeps them for four runs.

    A loop over epochs with a call of `train` in each of them compiles once.

    Args:
      cluster: functions of the workers.
      weights: weights of the rounds.
      state: state before the first dispatch; only its shapes and shardings are kept.

    Returns:
      A dispatcher, that of an earlier run with equal arguments if there is one.
    """
    signature = _Signature.of(cluster, weights, state)
    dispatcher = _last_dispatchers.pop(signature, None)
    if dispatcher is None:
        dispatcher = Dispatcher(cluster, weights, state)
    dispatcher.reset()
    _last_dispatchers[signature] = dispatcher
    while len(_last_dispatchers) > _NUM_DISPATCHERS:
        _last_dispatchers.popitem(last=False)
    return dispatcher


class ResultQueue:
    """Results of dispatches in flight, read one dispatch late.

    While the host reads the metrics of a dispatch, the devices compute the next one, so
    at most two are in flight. If the metrics span several processes, reading is a
    collective; it is done once per round, and in between the queue only waits.
    """

    def __init__(self, is_multi_process: bool) -> None:
        """Initialises an empty queue."""
        self._results: list[DispatchResult] = []
        self._is_multi_process = is_multi_process

    def push(self, result: DispatchResult) -> list[DispatchResult]:
        """Adds a result; waits for the earlier ones and returns them on the host.

        Args:
          result: of the latest dispatch.

        Returns:
          Earlier results, oldest first; none if the queue holds them back until a round
          has ended.
        """
        earlier = self._results
        if self._is_multi_process and not any(any(r.due) for r in earlier):
            for held_back in earlier[-1:]:
                held_back.wait()
            self._results = [*earlier, result]
            return []
        self._results = [result]
        return [one.to_host() for one in earlier]

    def pop_all(self) -> list[DispatchResult]:
        """Waits for all results and returns them on the host, oldest first."""
        results, self._results = self._results, []
        return [result.to_host() for result in results]


def _mesh_shardings(state: State) -> State | None:
    """Returns the shardings of a state on a mesh, which its programs must keep.

    A state with other shardings would be another program in the next dispatch.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    is_on_mesh = all(isinstance(x, NamedSharding) for x in jax.tree.leaves(shardings))
    return shardings if is_on_mesh else None


def _local_steps(
    cluster: Cluster,
    weights: RoundWeights,
    state: State,
    batches: PyTree,
    totals: RoundTotals | None,
) -> tuple[State, tuple[tuple[dict, dict], RoundTotals | None]]:
    """Runs local steps; leaves of the batches are (H, K, B, ...)."""
    state, metrics = jax.lax.scan(cluster.step, state, batches)
    return state, (_named_metrics(metrics, state), weights.add(totals, metrics))


def _rounds(
    cluster: Cluster,
    weights: RoundWeights,
    state: State,
    batches: PyTree,
    given: jax.Array | None,
    totals: RoundTotals | None,
    period: int,
    round_class: RoundClass | None,
) -> tuple[State, tuple[tuple[dict, dict], dict]]:
    """Runs whole rounds of `period` steps; leaves of the batches are (H, K, B, ...).

    The first round continues the sums `totals`. `given` has a row for each round.
    """
    nested = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // period, period, *x.shape[1:]), batches
    )

    def one_round(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        (state, totals), (batches, given) = carry, inputs
        state, metrics = jax.lax.scan(cluster.step, state, batches)
        weight = weights.weight(given, weights.add(totals, metrics))
        state = sync_in_class(cluster, round_class, state, weight)
        zeros = jax.tree.map(jnp.zeros_like, totals)
        return (state, zeros), (metrics, rule_metrics(state))

    carry = state, jax.tree.map(jnp.asarray, totals)
    (state, _), (metrics, values) = jax.lax.scan(one_round, carry, (nested, given))
    flat = jax.tree.map(lambda x: x.reshape(x.shape[0] * period, *x.shape[2:]), metrics)
    at_each_step = jax.tree.map(lambda x: jnp.repeat(x, period), values)
    return state, (_named_metrics(flat, state), at_each_step)


def _named_metrics(
    metrics: PyTree, state: State
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Returns metrics and metric objects; raises while traced for reserved names."""
    objects, others = metric_objects(metrics)
    named = metrics_by_name(others, ndim=2)
    names = [*named, *objects]
    check_column_names("train(): metrics", names, rule_metrics(state))
    check_column_names("train(): metrics of rules", rule_metrics(state))
    return named, objects


def _sync(
    cluster: Cluster,
    weights: RoundWeights,
    state: State,
    given: jax.Array | None = None,
    totals: RoundTotals | None = None,
    *,
    round_class: RoundClass | None,
) -> State:
    """Synchronises; the weights were checked when the run began."""
    weight = weights.weight(given, totals)
    return sync_in_class(cluster, round_class, state, weight)
