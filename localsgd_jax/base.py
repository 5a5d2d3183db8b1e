"""The types that everything else is made of: rules, algorithms, clusters, states."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

PyTree = Any


class Lane(str):
    """Name of an axis of workers that share a device: vmap carries it, no mesh does."""


class Context(NamedTuple):
    """What a synchronisation rule knows besides the tree that it agrees on.

    Attributes:
      axes: for each worker axis, outermost first, the named axes that carry it, such
        as `{"worker": ("worker", Lane("lane"))}`. Only `collectives` looks inside.
      round: number of this round, 1 for the first: an unbatched int32 scalar, or a
        Python int when a round is only being counted.
      weight: this worker's share in the mean, a float scalar, or None for equal
        shares.
    """

    axes: Mapping[str, tuple[str, ...]]
    round: jax.Array | int
    weight: jax.Array | None = None


class RuleState(NamedTuple):
    """What a rule remembers between rounds.

    Attributes:
      agreed: the same for all workers (anchor, outer momentum): one copy. It may be
        computed from reduced values and from itself, never from a worker's own.
      own: one worker's own (a compression residual): one copy per worker.
    """

    agreed: PyTree = ()
    own: PyTree = ()


class Notes(NamedTuple):
    """Numbers that a rule leaves in its agreed state for the history of a run.

    Attributes:
      numbers: scalars by name; `train` gives each a column.
    """

    numbers: dict[str, jax.Array]


class Rows(NamedTuple):
    """A part of `RuleState.own` that differs between workers from the beginning.

    Attributes:
      tree: leaves `(K, ...)`, a row for each worker; what is not in `Rows` is repeated.
    """

    tree: PyTree


class SyncRule(NamedTuple):
    """How workers agree, written from one worker's point of view.

    Attributes:
      init: `init(tree) -> RuleState`.
      apply: `apply(tree, state, context) -> (tree, RuleState)`.
      mean_over: the worker axes, () for all of them, if the rule is the plain weighted
        mean over them; rules that change how a mean travels ask for it. Else None.
    """

    init: Callable[[PyTree], RuleState]
    apply: Callable[[PyTree, RuleState, Context], tuple[PyTree, RuleState]]
    mean_over: tuple[str, ...] | None = None


class Algorithm(NamedTuple):
    """Local SGD as one worker sees it.

    Attributes:
      init: `init(params) -> (worker, RuleState)`.
      step: `step(worker, batch) -> (worker, metrics)`. It cannot communicate: it
        is given neither an axis name nor anything that workers share.
      sync: `sync(worker, rule_state, context) -> (worker, rule_state)`.
    """

    init: Callable[[PyTree], tuple[PyTree, RuleState]]
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    sync: Callable[[PyTree, RuleState, Context], tuple[PyTree, RuleState]]


class State(NamedTuple):
    """K workers between two calls.

    The counters stand outside the workers' part on purpose. Inside, a placement
    would give every worker a counter of its own, and a condition on it would cost a
    collective (on a mesh) or both branches (under vmap) at every step.

    Attributes:
      step: local updates done, int32 scalar, the same everywhere.
      round: synchronisations done, int32 scalar, the same everywhere.
      workers: each worker's training state, leaves `(K, ...)`.
      own: the rule's state of each worker, leaves `(K, ...)`.
      agreed: the rule's state that all share, no worker axis.
    """

    step: jax.Array
    round: jax.Array
    workers: PyTree
    own: PyTree
    agreed: PyTree


class Cluster(NamedTuple):
    """The three verbs for K workers, wherever they live.

    Attributes:
      init: `init(params) -> State`; every worker starts from `params`. Given shapes
        (`jax.ShapeDtypeStruct`), it returns shapes with shardings, to compile for.
      step: `step(state, batch) -> (state, metrics)`; leaves `(K, B, ...)` in, `(K,
        ...)` out. Never communicates.
      sync: `sync(state, weight=None) -> state`; one round of communication.
      workers: K.
      put: `put(batch, time=False) -> batch`; sends a host batch to the workers'
        devices. `time=True` for leaves `(H, K, B, ...)`. Shapes give shapes.
      sent: `sent(state, round=None) -> (least, most)`; bytes that one worker sends in
        that round, or in any, if it has a link of its own.
      algorithm: what one worker does.
      sync_if: `sync_if(due, state, weight=None) -> state`; a round of communication if
        `due`, a boolean that all workers share. Otherwise nothing is sent.
    """

    init: Callable[[PyTree], State]
    step: Callable[[State, PyTree], tuple[State, PyTree]]
    sync: Callable[..., State]
    workers: int
    put: Callable[..., PyTree]
    sent: Callable[..., tuple[int, int]]
    algorithm: Algorithm
    sync_if: Callable[..., State]
