"""Times a local step and an all-reduce on the devices that are here."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from localsgd_jax import cost, fields
from localsgd_jax.base import Cluster, PyTree, State
from localsgd_jax.ledger import Entry, ledger

REPEATS, SHORTEST = 5, 0.05
LARGE = 2**22  # Bytes enough for a bandwidth to show.


class Measured(NamedTuple):
    """What was measured.

    Attributes:
      job: with the time of a step, the size of the model, its bits on the wire, and
        what a synchronisation takes besides the link.
      link: that explains the times of all-reduces.
      sizes, seconds: bytes and times of the all-reduces.
    """

    job: cost.Job
    link: cost.Link
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]


def measure(
    cluster: Cluster, state: State, batch: PyTree, mesh: Mesh, axis: str = "worker"
) -> Measured:
    """Times the local steps of a cluster, and all-reduces of up to its model's size.

    The largest all-reduce has 4 MB at least.

    Args:
      cluster, state, batch: as for `cluster.step`.
      mesh: on which the cluster lives.
      axis: between workers.

    Returns:
      What was measured.

    Raises:
      ValueError: if the mesh has a single place along the axis.
    """
    places = mesh.shape.get(axis, 1)
    if places < 2:
        raise ValueError(
            f"plan: the mesh {dict(mesh.shape)} has no two places along {axis!r}"
        )
    params = jax.tree.leaves(fields.read(state.workers, ["params"]))
    parameters = sum(x.size // cluster.workers for x in params)
    largest = max(4 * parameters, LARGE)
    sizes = tuple(largest // part for part in (64, 8, 1))
    seconds = tuple(all_reduce_seconds(mesh, axis, size) for size in sizes)
    sent = cluster.sent(state)[1] * cluster.workers / (2 * (cluster.workers - 1))
    link = cost.fit_link(places, sizes, seconds)
    job = cost.Job(
        workers=places,
        compute=step_seconds(cluster, state, batch),
        parameters=parameters,
        bits=8 * sent / parameters,
    )
    besides = sync_seconds(cluster, state) - cost.waiting_time(job, link)
    return Measured(job._replace(overhead=max(0.0, besides)), link, sizes, seconds)


def step_seconds(cluster: Cluster, state: State, batch: PyTree) -> float:
    """Times a local step among many in one dispatch, as in a fused round."""

    def many(state: State, count: jax.Array) -> State:
        return jax.lax.fori_loop(
            0, count, lambda _, state: cluster.step(state, batch)[0], state
        )

    return _each(jax.jit(many), state)


def sync_seconds(cluster: Cluster, state: State) -> float:
    """Times a synchronisation among many in one dispatch."""

    def many(state: State, count: jax.Array) -> State:
        return jax.lax.fori_loop(0, count, lambda _, state: cluster.sync(state), state)

    return _each(jax.jit(many), state)


def all_reduce_seconds(mesh: Mesh, axis: str, size: int) -> float:
    """Times an all-reduce of so many bytes among many in one dispatch."""
    return _each(*_all_reduces(mesh, axis, size))


def all_reduce_entries(mesh: Mesh, axis: str, size: int) -> tuple[Entry, ...]:
    """Returns the ledger of what `all_reduce_seconds` times."""
    return ledger(*_all_reduces(mesh, axis, size), 1, mesh=mesh)


def _all_reduces(mesh: Mesh, axis: str, size: int) -> tuple[Callable, jax.Array]:
    """Makes a program of many all-reduces, one after another, and its input."""
    spec = PartitionSpec(axis)
    share = 1 / mesh.shape[axis]

    def many(x: jax.Array, count: jax.Array) -> jax.Array:
        # Scaled, so that the sums stay finite and each needs the one before.
        def one(_, x: jax.Array) -> jax.Array:
            return jax.lax.psum(x, axis) * share

        return jax.lax.fori_loop(0, count, one, x)

    spread = jax.shard_map(
        many,
        mesh=mesh,
        in_specs=(spec, PartitionSpec()),
        out_specs=spec,
        axis_names={axis},
        check_vma=False,
    )
    shape = mesh.shape[axis], max(1, size // 4)
    ones = jax.device_put(jnp.ones(shape, jnp.float32), NamedSharding(mesh, spec))
    return jax.jit(spread), ones


def timed(function: Callable, *args) -> float:
    """Returns the seconds that a call takes until its result is there."""
    began = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - began


def _each(many: Callable, start: PyTree) -> float:
    """Times one turn of a loop: the median of what is left without the dispatch."""
    jax.block_until_ready(many(start, 1))
    count = 1
    while timed(many, start, count) < SHORTEST:
        count *= 2
    seconds = [
        (timed(many, start, 2 * count) - timed(many, start, count)) / count
        for _ in range(REPEATS)
    ]
    return max(statistics.median(seconds), 1e-9)
