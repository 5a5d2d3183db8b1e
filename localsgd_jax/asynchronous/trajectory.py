"""Snapshots of the aggregate during a run."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from localsgd_jax.asynchronous.aggregation import (
    Aggregation,
    UpdateContext,
    resolve_aggregation,
)
from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check_int


class SnapshotState(NamedTuple):
    """State of `with_snapshots`.

    Attributes:
      inner: state of the wrapped aggregation.
      num_updates: number of updates applied, int32 scalar.
      snapshots: row i is the aggregate after update (i + 1) · every, leaves
        `(count, ...)`; rows that have not been reached are zeros.
    """

    inner: PyTree
    num_updates: jax.Array
    snapshots: PyTree


def with_snapshots(
    aggregation: Aggregation | None = None, *, count: int, every: int = 1
) -> Aggregation:
    """Wraps an aggregation to store the aggregate every few updates.

        snapshots[i] = z after update (i + 1) · every,   i < count

    The times of the updates are `EventTrace.time` of the APPLY events, or the column
    "seconds" in the history of `on_threads`. Updates after the last row are not stored.

    Args:
      aggregation: the wrapped aggregation; None for `mean_update()`.
      count: number of snapshots.
      every: updates between two snapshots.

    Returns:
      An aggregation whose state is a `SnapshotState`.

    Raises:
      TypeError: if the aggregation is not an `Aggregation` or a number is not an int.
      ValueError: if a number is below 1.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> from localsgd_jax import asynchronous
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5))
      >>> events = asynchronous.simulate_events(2, steps=1, schedule=1, speed=[2, 1])
      >>> aggregation = asynchronous.with_snapshots(count=2)
      >>> cluster = asynchronous.simulate(algorithm, events, aggregation)
      >>> state = cluster.init(jnp.zeros(()))
      >>> state, _ = cluster.run(state, jnp.array([[1.0, 3.0]]))
      >>> state.aggregation_state.snapshots
      Array([0.5, 2. ], dtype=float32)
    """
    wrapped = resolve_aggregation("with_snapshots(aggregation)", aggregation)
    count = check_int("with_snapshots(count)", "count", count, 1)
    every = check_int("with_snapshots(every)", "every", every, 1)

    def init(aggregate: PyTree) -> SnapshotState:
        snapshots = jax.tree.map(
            lambda z: jnp.zeros((count, *z.shape), z.dtype), aggregate
        )
        return SnapshotState(wrapped.init(aggregate), jnp.int32(0), snapshots)

    def apply(
        aggregate: PyTree,
        update: PyTree,
        state: SnapshotState,
        context: UpdateContext,
    ) -> tuple[PyTree, SnapshotState]:
        aggregate, inner = wrapped.apply(aggregate, update, state.inner, context)
        num_updates = state.num_updates + 1
        row = jnp.where(num_updates % every == 0, num_updates // every - 1, count)
        snapshots = jax.tree.map(
            lambda rows, z: rows.at[row].set(z, mode="drop"), state.snapshots, aggregate
        )
        return aggregate, SnapshotState(inner, num_updates, snapshots)

    return Aggregation(init, apply)
