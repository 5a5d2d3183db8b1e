"""What the aggregate was on the way."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from localsgd_jax.asynchronous.aggregation import (
    Aggregation,
    Arrival,
    check_aggregation,
)
from localsgd_jax.asynchronous.checks import whole
from localsgd_jax.base import PyTree


class Recorded(NamedTuple):
    """The memory of `recorded`.

    Attributes:
      memory: what the recorded aggregation remembers.
      writes: how many there were, an int32 scalar.
      points: row i is the aggregate after write (i + 1) · every, leaves `(count, ...)`;
        rows not reached yet are zeros.
    """

    memory: PyTree
    writes: jax.Array
    points: PyTree


def recorded(
    aggregation: Aggregation | None = None, *, count: int, every: int = 1
) -> Aggregation:
    """Keeps the aggregate as it was after some of the writes.

        points[i] = z after write (i + 1) · every,   i < count

    When those happened is in `Events.time` for kind 2, or in the history of
    `on_threads`. Writes beyond the last row change nothing here.

    Args:
      aggregation: what the writes do; None for `add()`.
      count: rows to keep.
      every: writes between two rows.

    Returns:
      An aggregation whose memory is a `Recorded`.

    Raises:
      TypeError: if an argument is not what it must be.
      ValueError: if a number is below 1.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> from localsgd_jax import asynchronous
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5),
      ...                            rule=lsgd.average())
      >>> events = asynchronous.order(workers=2, steps=1, every=1, speed=[2, 1])
      >>> watched = asynchronous.recorded(count=2)
      >>> place = asynchronous.simulate(algorithm, events, watched)
      >>> state, _ = place.run(place.init(jnp.zeros(())), jnp.array([[1.0, 3.0]]))
      >>> state.memory.points
      Array([0.5, 2. ], dtype=float32)
    """
    inner = check_aggregation("recorded(aggregation)", aggregation)
    count = whole("recorded(count)", count)
    every = whole("recorded(every)", every)

    def init(aggregate: PyTree) -> Recorded:
        points = jax.tree.map(
            lambda z: jnp.zeros((count, *z.shape), z.dtype), aggregate
        )
        return Recorded(inner.init(aggregate), jnp.int32(0), points)

    def apply(
        aggregate: PyTree, progress: PyTree, memory: Recorded, arrival: Arrival
    ) -> tuple[PyTree, Recorded]:
        aggregate, own = inner.apply(aggregate, progress, memory.memory, arrival)
        writes = memory.writes + 1
        row = jnp.where(writes % every == 0, writes // every - 1, count)
        points = jax.tree.map(
            lambda kept, z: kept.at[row].set(z, mode="drop"), memory.points, aggregate
        )
        return aggregate, Recorded(own, writes, points)

    return Aggregation(init, apply)
