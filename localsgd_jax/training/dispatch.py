"""Compiled programs of a run, and the results of their dispatches."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.analysis.device_bytes import ByteRange, DeviceBytes
from localsgd_jax.core.metrics import metrics_by_name, rule_metrics
from localsgd_jax.core.types import Cluster, PyTree, State
from localsgd_jax.distributed import arrays
from localsgd_jax.execution import rounds
from localsgd_jax.training.segments import Segment


class DispatchResult(NamedTuple):
    """Metrics of the local steps of a dispatch.

    Attributes:
      due: for each step, whether workers synchronised after it.
      metrics: metrics of the training step by name, `(H, K)`.
      rule_metrics: metrics of the synchronisation rules after each step, `(H,)`.
      device_bytes: bytes that a device sends in a synchronisation, or None.
    """

    due: tuple[bool, ...]
    metrics: Mapping[str, Any]
    rule_metrics: Mapping[str, Any]
    device_bytes: ByteRange | None

    def wait(self) -> None:
        """Blocks until the dispatch is done."""
        jax.block_until_ready((self.metrics, self.rule_metrics))

    def to_host(self) -> "DispatchResult":
        """Blocks until the dispatch is done and copies the metrics to NumPy.

        If the metrics span several processes, this is a collective.
        """
        metrics, rule_values = arrays.to_host((self.metrics, self.rule_metrics))
        return self._replace(metrics=metrics, rule_metrics=rule_values)


class Dispatcher:
    """Compiled programs of a run: fused rounds, gated steps and a synchronisation."""

    def __init__(
        self, cluster: Cluster, weights: jax.Array | None, state: State
    ) -> None:
        """Wraps the programs in `jax.jit`; compiles nothing.

        Args:
          cluster: functions of the workers.
          weights: `(K,)`, or None for equal weights.
          state: state before the first dispatch; only its shardings are read.
        """
        self._weights, self._device_bytes = weights, DeviceBytes(state)
        self._fused = jax.jit(
            partial(_fused_rounds, cluster, weights),
            donate_argnums=0,
            static_argnames="period",
        )
        self._gated = jax.jit(partial(_gated_steps, cluster, weights), donate_argnums=0)
        self._sync = jax.jit(cluster.sync, donate_argnums=0)

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
        bytes_per_round = self._device_bytes.bytes_per_round
        if period := segment.period:
            device_bytes = bytes_per_round(
                self._fused,
                state,
                batches,
                rounds=segment.steps // period,
                period=period,
            )
            state, metrics = self._fused(state, batches, period=period)
        else:
            args = state, batches, np.array(segment.due)
            device_bytes = bytes_per_round(self._gated, *args, rounds=None)
            state, metrics = self._gated(*args)
        by_step, by_rule = metrics
        return state, DispatchResult(segment.due, by_step, by_rule, device_bytes)

    def synchronize(self, state: State) -> tuple[State, ByteRange | None]:
        """Ends an incomplete round.

        Args:
          state: state within a round; it is donated.

        Returns:
          The synchronised state, and the bytes that a device sends for it.
        """
        args = state, self._weights
        device_bytes = self._device_bytes.bytes_per_round(self._sync, *args, rounds=1)
        return self._sync(*args), device_bytes


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


def _fused_rounds(
    cluster: Cluster,
    weights: jax.Array | None,
    state: State,
    batches: PyTree,
    period: int,
) -> tuple[State, tuple[dict, dict]]:
    """Runs whole rounds of `period` steps; leaves of the batches are (H, K, B, ...)."""
    nested = jax.tree.map(lambda x: x.reshape(-1, period, *x.shape[1:]), batches)
    one_round = rounds.fused(cluster)

    def body(state: State, batches: PyTree) -> tuple[State, tuple]:
        state, metrics = one_round(state, batches, weights)
        return state, (metrics, rule_metrics(state))

    state, (metrics, values) = jax.lax.scan(body, state, nested)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), metrics)
    at_each_step = jax.tree.map(lambda x: jnp.repeat(x, period), values)
    return state, (metrics_by_name(flat, ndim=2), at_each_step)


def _gated_steps(
    cluster: Cluster,
    weights: jax.Array | None,
    state: State,
    batches: PyTree,
    due: jax.Array,
) -> tuple[State, tuple[dict, dict]]:
    """Runs steps, each followed by a synchronisation if it is due, `(H,)`."""

    def body(state: State, inputs: tuple) -> tuple[State, tuple]:
        batch, is_due = inputs
        state, metrics = cluster.step(state, batch)
        state = cluster.sync_if(is_due, state, weights)
        return state, (metrics, rule_metrics(state))

    state, (metrics, values) = jax.lax.scan(body, state, (batches, due))
    return state, (metrics_by_name(metrics, ndim=2), values)
