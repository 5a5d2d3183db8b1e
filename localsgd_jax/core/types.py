"""Core types: SyncRule, Algorithm, Cluster and State."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from localsgd_jax.core.call_names import function_name

PyTree = Any


class VmapAxis(str):
    """Name of a vmap axis over the workers of one device.

    Other names in `SyncContext.axes` are mesh axes. A position on a vmap axis is a
    lane: one of several workers vmapped on one device.
    """


class SyncContext(NamedTuple):
    """Arguments of a synchronisation rule besides the tree.

    Attributes:
      axes: for each worker axis, outermost first, the mesh and vmap axes that carry
        it, such as `{"worker": ("worker", VmapAxis("lane"))}`. Only
        `core.collectives` reads it.
      round: number of this round, 1 for the first: an unbatched int32 scalar, a Python
        int when the bytes of a round are counted, or in the programs of `train` a
        `CyclicRound`, whose remainders are Python ints.
      weight: weight of this worker in the mean, a float scalar, or None for equal
        weights.
      specs: `PartitionSpec` of each leaf of the tree over the axes inside a worker;
        None if the mesh has no such axes. A rule that passes another tree to an inner
        rule passes the specs of that tree.
    """

    axes: Mapping[str, tuple[str, ...]]
    round: jax.Array | int
    weight: jax.Array | None = None
    specs: PyTree | None = None


class RuleState(NamedTuple):
    """State of a rule between rounds.

    Attributes:
      shared: replicated over workers (anchor, outer momentum), stored once. It may be
        computed from reduced values and from itself, never from per-worker values.
      local: per-worker part (a compression residual), one copy for each worker.
    """

    shared: PyTree = ()
    local: PyTree = ()


def states_by_name(states: Mapping[str, RuleState]) -> RuleState:
    """Converts a dict of rule states into a rule state of dicts."""
    return RuleState(
        {name: state.shared for name, state in states.items()},
        {name: state.local for name, state in states.items()},
    )


class RuleMetrics(NamedTuple):
    """Scalar metrics in `RuleState.shared`, which `train` adds to the history.

    Attributes:
      scalars: scalars by name; each is a column of the history.
    """

    scalars: dict[str, jax.Array]


class PerWorker(NamedTuple):
    """A part of `RuleState.local` with different initial values for each worker.

    Attributes:
      tree: leaves `(K, ...)`, a row for each worker. Leaves of `RuleState.local` that
        are not inside a `PerWorker` are repeated K times.
    """

    tree: PyTree


@jax.tree_util.register_pytree_node_class
class Sharded:
    """A part of a `RuleState` from `init`, with its partition inside a worker.

    The partition of all other leaves is inferred by `core.pieces.infer_specs`. Only
    `init` returns it; `apply` receives the tree.

    Attributes:
      tree: any part of the state.
      specs: `PartitionSpec` of each leaf, in the order of `jax.tree.leaves`.
    """

    def __init__(self, tree: PyTree, specs: PyTree) -> None:
        """Stores the leaves of the specs."""
        self.tree, self.specs = tree, tuple(jax.tree.leaves(specs))

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Returns the tree as child; the specs are static."""
        return (self.tree,), self.specs

    @classmethod
    def tree_unflatten(cls, specs: tuple, children: tuple) -> "Sharded":
        """Inverts `tree_flatten`."""
        (tree,) = children
        return cls(tree, specs)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StateSpecs:
    """Partition of a `State` over the axes inside a worker; static.

    Attributes:
      workers: `PartitionSpec` of each leaf of the train state of one worker, in the
        order of `jax.tree.leaves`.
      local: of the local part of the rule state of one worker.
      shared: of the shared part of the rule state.
    """

    workers: tuple[PartitionSpec, ...]
    local: tuple[PartitionSpec, ...]
    shared: tuple[PartitionSpec, ...]


@dataclasses.dataclass(frozen=True)
class SyncRule:
    """A synchronisation rule, written for a single worker.

    Attributes:
      init: `init(tree, specs) -> RuleState`; the specs are those of `SyncContext`.
      apply: `apply(tree, state, context) -> (tree, RuleState)`.
      mean_axes: if the rule is the plain weighted mean, the worker axes of the mean,
        () for all of them; else None. Rules that compress the communication of a mean
        require it.
      name: the call that made the rule, with its arguments. Processes of one job and
        checkpoints of one run must have equal names. The default,
        `custom(<name of apply>)`, holds no arguments.
      fields: field of the train state to which the rule applies outside a dict of
        rules; of several fields it receives a dict of their trees.
    """

    init: Callable[..., RuleState]
    apply: Callable[[PyTree, RuleState, SyncContext], tuple[PyTree, RuleState]]
    mean_axes: tuple[str, ...] | None = None
    name: str = ""
    fields: str | tuple[str, ...] = "params"

    def __post_init__(self) -> None:
        """Sets the default name."""
        if not self.name:
            function = function_name(self.apply) or type(self.apply).__name__
            object.__setattr__(self, "name", f"custom({function})")

    def __repr__(self) -> str:
        """Returns the call that made this rule."""
        return self.name


class Algorithm(NamedTuple):
    """The functions of one worker: initialisation, local step and synchronisation.

    Attributes:
      init: `init(params, specs=None) -> (worker, RuleState)`; the specs are the
        partition of `params` over the axes inside a worker, as in `SyncContext`.
      step: `step(worker, batch) -> (worker, metrics)`. It cannot communicate: it
        receives neither an axis name nor shared state.
      sync: `sync(worker, rule_state, context) -> (worker, rule_state)`.
      rule_names: name of the rule of each synchronised field.
      partition_specs: `partition_specs(params) -> specs`; the `PartitionSpec` over axes
        inside a worker, or None, of each leaf in the order of `jax.tree.leaves`, by
        metadata of the model. None for the boxes in `params`.
      optimizer_name: the inner optimizer with its numbers; None if it is not known.
    """

    init: Callable[..., tuple[PyTree, RuleState]]
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    sync: Callable[[PyTree, RuleState, SyncContext], tuple[PyTree, RuleState]]
    rule_names: Mapping[str, str]
    partition_specs: Callable[[PyTree], list] | None = None
    optimizer_name: str | None = None


class State(NamedTuple):
    """State of K workers between two calls of a cluster.

    The counters are not part of the workers' states. A placement would give each
    worker its own counter, and a condition on it would cost a collective (on a mesh) or
    the execution of both branches (under vmap) at every step.

    Attributes:
      step: number of local steps done, int32 scalar, replicated.
      round: number of synchronisations done, int32 scalar, replicated.
      workers: train state of each worker, leaves `(K, ...)`.
      local: per-worker part of the rule state, leaves `(K, ...)`.
      shared: replicated part of the rule state, without a worker axis.
      specs: partition of the state over the axes inside a worker, static; None if the
        mesh has no such axes.
    """

    step: jax.Array
    round: jax.Array
    workers: PyTree
    local: PyTree
    shared: PyTree
    specs: StateSpecs | None = None


class Cluster(NamedTuple):
    """The operations on K workers, independent of their placement.

    Attributes:
      init: `init(params) -> State`; every worker starts from `params`. Given
        `jax.ShapeDtypeStruct` leaves, it returns such leaves with shardings, for
        compilation. Given a function without arguments that makes the parameters, it
        creates them in the program that creates the state, sharded by the metadata of
        the model or by the `out_shardings` of `jax.jit`.
      step: `step(state, batch) -> (state, metrics)`, one local step; leaves `(K, B,
        ...)` in, `(K, ...)` out. It contains no collectives along worker axes.
      sync: `sync(state, weight=None) -> state`; one round of communication.
      num_workers: K.
      shard_batch: `shard_batch(batch, time=False) -> batch`; transfers a host batch to
        the devices of the workers, with leaves `(H, K, B, ...)` if `time=True`.
        `jax.ShapeDtypeStruct` leaves give such leaves.
      bytes_sent: `bytes_sent(state, round=None) -> (min, max)`; bytes that one worker
        with a link of its own sends in that round, or in any round.
      algorithm: the algorithm of one worker.
      sync_if: `sync_if(due, state, weight=None) -> state`; one round of communication
        if `due`, a boolean equal on all workers. Otherwise nothing is sent.
    """

    init: Callable[[PyTree], State]
    step: Callable[[State, PyTree], tuple[State, PyTree]]
    sync: Callable[..., State]
    num_workers: int
    shard_batch: Callable[..., PyTree]
    bytes_sent: Callable[..., tuple[int, int]]
    algorithm: Algorithm
    sync_if: Callable[..., State]
