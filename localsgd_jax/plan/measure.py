"""Times a local step, a round and an all-reduce on the devices that are here."""

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
from localsgd_jax.rounds import fused

REPEATS, SHORTEST, BATCHES = 5, 0.05, 4
LARGE = 2**22  # Bytes enough for a bandwidth to show.


class Measured(NamedTuple):
    """What was measured.

    Attributes:
      job: with the time of a step, the size of the model, its bits on the wire, and
        what a round takes besides its steps and the link.
      link: that explains the times of all-reduces.
      sizes, seconds: bytes and times of the all-reduces.
    """

    job: cost.Job
    link: cost.Link
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]


def measure(
    cluster: Cluster,
    state: State,
    batch: PyTree,
    mesh: Mesh,
    axis: str = "worker",
    repeats: int = REPEATS,
) -> Measured:
    """Times steps and rounds of a cluster, and all-reduces of up to its model's size.

    The largest all-reduce has 4 MB at least. What a round takes besides its steps and a
    predicted exchange counts as its overhead.

    Args:
      cluster, state, batch: as for `cluster.step`.
      mesh: on which the cluster lives.
      axis: between workers.
      repeats: times of which each median is.

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
    seconds = tuple(all_reduce_seconds(mesh, axis, size, repeats) for size in sizes)
    sent = cluster.sent(state)[1] * cluster.workers / (2 * (cluster.workers - 1))
    link = cost.fit_link(places, sizes, seconds)
    step, rest = round_seconds(cluster, state, batch, repeats)
    job = cost.Job(places, step, parameters, bits=8 * sent / parameters)
    overhead = max(0.0, rest - cost.waiting_time(job, link))
    return Measured(job._replace(overhead=overhead), link, sizes, seconds)


def round_seconds(
    cluster: Cluster, state: State, batch: PyTree, repeats: int = REPEATS
) -> tuple[float, float]:
    """Times what a fused round is made of: local steps, and the rest.

        c = (t(N) − t(B))/(N − B),  w = r − c

    t(n) is a dispatch of n steps, B or many times B; r is a fused round of one step. As
    in any round batches are stacked over time, states donated, dispatches waited for.

    Args:
      cluster, state, batch: as for `cluster.step`.
      repeats: times of which the medians are.

    Returns:
      Seconds of a step, and of what else a round takes: the exchange, the rule, the
      dispatch, and waiting for the last.
    """
    stacked = jax.tree.map(lambda x: jnp.stack([x] * BATCHES), batch)
    first = jax.tree.map(lambda x: x[:1], stacked)

    def steps(state: State, batches: PyTree, turns: jax.Array) -> tuple[State, None]:
        def turn(_, state: State) -> State:
            return jax.lax.scan(cluster.step, state, batches)[0]

        return jax.lax.fori_loop(0, turns, turn, state), None

    some = _going_on(steps, state, cluster.put(stacked, time=True), 1)
    whole = _going_on(fused(cluster), state, cluster.put(first, time=True))
    times = _enough(whole)
    # One step is the difference of two times, so the longer one is made long.
    turns = max(2, _enough(lambda turns: some(1, turns), 6 * SHORTEST))
    found = []
    for _ in range(repeats):
        step = (some(1, turns) - some(1, 1)) / ((turns - 1) * BATCHES)
        # Many rounds, since a rule may not do the same in each.
        found.append((step, whole(times) / times - step))
    step, rest = (statistics.median(column) for column in zip(*found, strict=True))
    return max(step, 1e-9), max(rest, 0.0)


def all_reduce_seconds(
    mesh: Mesh, axis: str, size: int, repeats: int = REPEATS
) -> float:
    """Times an all-reduce of so many bytes among many in one dispatch."""
    return _each(*_all_reduces(mesh, axis, size), repeats)


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


def _going_on(function: Callable, state: State, batches: PyTree, *first) -> Callable:
    """Makes timed calls, so many in a row, that go on from the state before."""
    call = jax.jit(function, donate_argnums=0)
    held = [jax.tree.map(jnp.copy, state)]

    def seconds(times: int, *more) -> float:
        began = time.perf_counter()
        for _ in range(times):
            held[0], metrics = call(held[0], batches, *more)
            jax.block_until_ready((held[0], metrics))
        return time.perf_counter() - began

    seconds(1, *first)
    return seconds


def _enough(seconds: Callable[[int], float], least: float | None = None) -> int:
    """Returns how many are needed to fill a time, the shortest if none is given."""
    count, least = 1, SHORTEST if least is None else least
    while seconds(count) < least:
        count *= 2
    return count


def _each(many: Callable, start: PyTree, repeats: int) -> float:
    """Times one turn of a loop: the median of what is left without the dispatch."""
    jax.block_until_ready(many(start, 1))
    count = _enough(lambda count: timed(many, start, count))
    seconds = [
        (timed(many, start, 2 * count) - timed(many, start, count)) / count
        for _ in range(repeats)
    ]
    return max(statistics.median(seconds), 1e-9)
