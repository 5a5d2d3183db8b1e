"""Measurement of local steps, rounds and all-reduces on local devices."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from localsgd_jax.core import train_state
from localsgd_jax.core.types import Cluster, PyTree, State
from localsgd_jax.core.validation import (
    check_int,
    check_state,
    check_type,
    check_worker_axis,
    describe,
)
from localsgd_jax.execution.rounds import fused
from localsgd_jax.planning import cost_model

REPEATS = 5
MIN_SECONDS = 0.05  # Shortest interval that is timed.
STEPS_PER_ITERATION = 4
MIN_ALL_REDUCE_BYTES = 2**22  # Large enough to measure a bandwidth.


class Measurement(NamedTuple):
    """Measured workload and link.

    Attributes:
      workload: with measured step time, number of parameters, bits per parameter, and
        overhead of a round.
      link: the link fitted to the all-reduces.
      sizes, seconds: bytes and times of the all-reduces.
    """

    workload: cost_model.Workload
    link: cost_model.Link
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]


def measure(
    cluster: Cluster,
    state: State,
    batch: PyTree,
    mesh: Mesh,
    axis: str = "worker",
    repeats: int = REPEATS,
) -> Measurement:
    """Measures the workload of a cluster and the link between its devices.

    All-reduces of three sizes are timed. The largest has the size of the model, but at
    least 4 MB. The time of a round that is neither local steps nor predicted
    communication is the overhead.

    Args:
      cluster, state, batch: as for `cluster.step`.
      mesh: mesh of the cluster.
      axis: mesh axis between workers.
      repeats: number of timings of which the median is used.

    Returns:
      The measurement.

    Raises:
      ValueError: if the mesh has no such axis or the axis has size 1, or if measured
        times do not increase with the size of the all-reduce.
    """
    positions = _check_axis("measure", mesh, axis)
    _check_run("measure", cluster, state, batch, repeats)
    params = jax.tree.leaves(train_state.get_fields(state.workers, ["params"]))
    parameters = sum(leaf.size // cluster.num_workers for leaf in params)
    largest = max(4 * parameters, MIN_ALL_REDUCE_BYTES)
    sizes = tuple(largest // divisor for divisor in (64, 8, 1))
    link, seconds = _fit_measured_link(mesh, axis, sizes, repeats)
    step, rest = round_seconds(cluster, state, batch, repeats)
    # Inverse of the ring formula 2(K − 1)/K · payload.
    bytes_sent, workers = cluster.bytes_sent(state)[1], cluster.num_workers
    payload = bytes_sent * workers / (2 * (workers - 1))
    workload = cost_model.Workload(
        positions, step, parameters, bits=8 * payload / parameters
    )
    exposed = cost_model.exposed_communication_seconds(workload, link)
    workload = workload._replace(overhead_seconds=max(0.0, rest - exposed))
    return Measurement(workload, link, sizes, seconds)


def round_seconds(
    cluster: Cluster, state: State, batch: PyTree, repeats: int = REPEATS
) -> tuple[float, float]:
    """Measures the time of a local step and the remaining time of a round.

        c = (t(N) − t(B))/(N − B),  w = r − c

    t(n) is the time of a dispatch of n steps, with n = B and a multiple N of B, and r
    is the time of a fused round of one step. As in training, batches are stacked over
    time, states are donated, and dispatches are waited for.

    Args:
      cluster, state, batch: as for `cluster.step`.
      repeats: number of timings of which the median is used.

    Returns:
      Seconds of a local step, and of the rest of a round: synchronisation, rule,
      dispatch, and waiting for the slowest worker.
    """

    _check_run("round_seconds", cluster, state, batch, repeats)

    def local_steps(
        state: State, batches: PyTree, iterations: jax.Array
    ) -> tuple[State, None]:
        def iteration(_, state: State) -> State:
            return jax.lax.scan(cluster.step, state, batches)[0]

        return jax.lax.fori_loop(0, iterations, iteration, state), None

    batches = jax.tree.map(lambda x: jnp.stack([x] * STEPS_PER_ITERATION), batch)
    first = jax.tree.map(lambda x: x[:1], batches)
    batches = cluster.shard_batch(batches, time=True)
    first = cluster.shard_batch(first, time=True)
    time_steps = _timed_loop(local_steps, state, (batches,), 1)
    time_rounds = _timed_loop(fused(cluster), state, (first,))
    rounds = _autorange(time_rounds)
    # A step is the difference of two times, so the longer one is several intervals.
    iterations = max(2, _autorange(lambda n: time_steps(1, n), 6 * MIN_SECONDS))
    timings = []
    for _ in range(repeats):
        iteration = _slope(lambda n: time_steps(1, n), 1, iterations)
        step = iteration / STEPS_PER_ITERATION
        # The mean of many rounds, since a rule may do different work in each.
        timings.append((step, time_rounds(rounds) / rounds - step))
    step, rest = (statistics.median(column) for column in zip(*timings, strict=True))
    return max(step, 1e-9), max(rest, 0.0)


def _check_axis(call: str, mesh: Mesh, axis: str) -> int:
    """Returns the size of a mesh axis; raises unless it is at least 2."""
    check_type(f"{call}(mesh)", "mesh", mesh, Mesh)
    check_type(f"{call}(axis)", "axis", axis, str)
    size = mesh.shape.get(axis, 1)
    if size < 2:
        raise ValueError(
            f"{call}(axis): an axis {axis!r} of size at least 2 is needed, got the "
            f"mesh {dict(mesh.shape)}"
        )
    return size


def _check_run(
    call: str, cluster: Cluster, state: State, batch: PyTree, repeats: int
) -> None:
    """Raises unless the arguments are a cluster, its state and batch, and a count."""
    check_type(f"{call}(cluster)", "cluster", cluster, Cluster)
    check_state(f"{call}(state)", state)
    if not jax.tree.leaves(batch):
        text = "batch must have at least one leaf"
        raise ValueError(f"{call}(batch): {text}, got {describe(batch)}")
    check_worker_axis(f"{call}(batch)", batch, cluster.num_workers)
    check_int(f"{call}(repeats)", "repeats", repeats, 1)


def _fit_measured_link(
    mesh: Mesh, axis: str, sizes: tuple[int, ...], repeats: int
) -> tuple[cost_model.Link, tuple[float, ...]]:
    """Fits a link to measured all-reduces, and returns their times as well.

    On a busy host, noise may exceed the differences between the sizes. They are then
    timed again, up to twice, each time with four times as many repeats.
    """
    for factor in (1, 4, 16):
        seconds = tuple(
            all_reduce_seconds(mesh, axis, size, factor * repeats) for size in sizes
        )
        try:
            return cost_model.fit_link(mesh.shape[axis], sizes, seconds), seconds
        except ValueError as error:
            failure = error
    raise failure


def all_reduce_seconds(
    mesh: Mesh, axis: str, size: int, repeats: int = REPEATS
) -> float:
    """Measures the seconds of an all-reduce of `size` bytes.

    Many all-reduces run in one dispatch. The difference between dispatches of 2n and
    of n all-reduces excludes the time of the dispatch.
    """
    _check_axis("all_reduce_seconds", mesh, axis)
    check_int("all_reduce_seconds(size)", "size", size, 1)
    check_int("all_reduce_seconds(repeats)", "repeats", repeats, 1)
    program, operand = _all_reduces(mesh, axis, size)
    time_all_reduces = _timed_loop(program, operand, (), 1)
    count = _autorange(lambda n: time_all_reduces(1, n))
    slopes = [
        _slope(lambda n: time_all_reduces(1, n), count, 2 * count)
        for _ in range(repeats)
    ]
    return max(statistics.median(slopes), 1e-9)


def _all_reduces(mesh: Mesh, axis: str, size: int) -> tuple[Callable, jax.Array]:
    """Returns a program of consecutive all-reduces and its first operand."""
    spec = PartitionSpec(axis)
    scale = 1 / mesh.shape[axis]

    def all_reduces(x: jax.Array, count: jax.Array) -> jax.Array:
        # The scale keeps the sums finite, and makes each depend on the one before.
        def all_reduce(_, x: jax.Array) -> jax.Array:
            return jax.lax.psum(x, axis) * scale

        return jax.lax.fori_loop(0, count, all_reduce, x)

    sharded = jax.shard_map(
        all_reduces,
        mesh=mesh,
        in_specs=(spec, PartitionSpec()),
        out_specs=spec,
        axis_names={axis},
        check_vma=False,
    )
    shape = mesh.shape[axis], max(1, size // 4)
    ones = jax.device_put(jnp.ones(shape, jnp.float32), NamedSharding(mesh, spec))
    return lambda x, count: (sharded(x, count), None), ones


def _timed_loop(
    function: Callable, carry: PyTree, args: tuple, *first: int
) -> Callable[..., float]:
    """Compiles `function(carry, *args, *iterations)` and returns a timer of its calls.

    The function returns the next carry and metrics. The timer
    `seconds(calls, *iterations)` times consecutive calls, each with the donated carry
    of the call before, and waits for every result. The call that compiles the function
    gets `first` as iterations.
    """
    call = jax.jit(function, donate_argnums=0)
    carry = jax.tree.map(jnp.copy, carry)

    def seconds(calls: int, *iterations: int) -> float:
        nonlocal carry
        start = time.perf_counter()
        for _ in range(calls):
            carry, metrics = call(carry, *args, *iterations)
            jax.block_until_ready((carry, metrics))
        return time.perf_counter() - start

    seconds(1, *first)
    return seconds


def _autorange(
    seconds: Callable[[int], float], min_seconds: float | None = None
) -> int:
    """Returns the smallest power of two of iterations that takes a minimum time."""
    min_seconds = MIN_SECONDS if min_seconds is None else min_seconds
    count = 1
    while seconds(count) < min_seconds:
        count *= 2
    return count


def _slope(seconds: Callable[[int], float], low: int, high: int) -> float:
    """Returns the seconds per iteration from the times of two iteration counts."""
    return (seconds(high) - seconds(low)) / (high - low)
