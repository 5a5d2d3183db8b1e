"""Algorithms 1 and 2 with stragglers, on a virtual clock and in real time.

A trajectory holds the model at a sequence of times: after the slowest worker of each
round in Algorithm 1, after every K updates of the aggregate in Algorithm 2.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import localsgd_jax as lsgd
from localsgd_jax import asynchronous
from localsgd_jax.experiments import logistic
from localsgd_jax.experiments.datasets import Dataset
from localsgd_jax.experiments.paper.step_size_grid import Examples
from localsgd_jax.experiments.paper.step_sizes import StepSizes, per_row_sgd

# Rounds between two points of a trajectory: in Algorithm 2 every snapshot in memory
# costs time at every event.
ROUNDS_PER_POINT = 4


class Workload(NamedTuple):
    """Workload of both algorithms.

    Attributes:
      workers: K.
      period: H.
      batch: b.
      steps: local steps T of each worker if all do equally many.
    """

    workers: int
    period: int
    batch: int
    steps: int


class StragglerProblem(NamedTuple):
    """A workload on a dataset, for S step sizes at once.

    Attributes:
      dataset: the dataset on the host.
      examples: the dataset on the device.
      sizes: the step sizes.
      workload: K, H, b and T.
    """

    dataset: Dataset
    examples: Examples
    sizes: StepSizes
    workload: Workload


class Trajectory(NamedTuple):
    """The model at n times.

    Attributes:
      times: `(n,)`, increasing.
      points: `(R, n, S, d)` for R seeds and S step sizes.
    """

    times: np.ndarray
    points: np.ndarray


def single_straggler_costs(workload: Workload, factor: float) -> np.ndarray:
    """Returns the time of a step if one worker is slower than the others.

    Args:
      workload: the workload, which defines K.
      factor: time of a step of worker 0 over that of the others.

    Returns:
      `(K,)` units of time.

    Example:
      >>> single_straggler_costs(Workload(workers=3, period=1, batch=1, steps=1), 4)
      array([4., 1., 1.])
    """
    costs = np.ones(workload.workers)
    costs[0] = factor
    return costs


def random_costs(workload: Workload, seed: int = 0) -> np.ndarray:
    """Samples the time of each step, `(T, K)`: independent, exponential, mean 1."""
    workers, steps = workload.workers, workload.steps
    return 1 / asynchronous.random_speeds(workers, steps, 1.0, seed=seed)


def run_synchronous(
    problem: StragglerProblem, costs: np.ndarray, seeds: int
) -> Trajectory:
    """Runs Algorithm 1 on a virtual clock; a round lasts as long as its slowest worker.

    Args:
      problem: the problem.
      costs: time of a step, `(K,)` or `(T, K)`.
      seeds: R.

    Returns:
      x̄ after every fourth round.
    """
    workers, period, _, steps = problem.workload
    rounds = steps // period // ROUNDS_PER_POINT * ROUNDS_PER_POINT
    indices = _sample_indices(problem, rounds * period, seeds)

    @jax.jit
    def run(examples: Examples, indices: jax.Array) -> jax.Array:
        cluster = lsgd.simulate(_algorithm(problem, examples), workers)
        one_round = lsgd.fused(cluster)

        def body(state: lsgd.State, batch: jax.Array) -> tuple[lsgd.State, jax.Array]:
            state, _ = one_round(state, batch)
            return state, state.workers.params[0]

        start = cluster.init(_initial_params(problem))
        return jax.lax.scan(body, start, indices)[1]

    by_round = indices.reshape(seeds, rounds, period, *indices.shape[2:])
    points = [np.asarray(run(problem.examples, of_seed)) for of_seed in by_round]
    all_costs = np.broadcast_to(costs, (rounds * period, workers))
    durations = all_costs.reshape(rounds, period, -1).sum(axis=1).max(axis=1)
    recorded = slice(ROUNDS_PER_POINT - 1, None, ROUNDS_PER_POINT)
    return Trajectory(np.cumsum(durations)[recorded], np.stack(points)[:, recorded])


def event_trace(workload: Workload, costs: np.ndarray) -> asynchronous.EventTrace:
    """Returns the events of a run of Algorithm 2 with K·T local steps.

    Args:
      workload: K, H and T.
      costs: time of a step, `(K,)` or `(T, K)`.

    Returns:
      The events; a slow worker does fewer steps and the others more.
    """
    speeds = 1 / costs if costs.ndim == 1 else np.ones(workload.workers)
    total = workload.steps * workload.workers
    steps = np.rint(total * speeds / speeds.sum()).astype(int)
    return asynchronous.simulate_events(
        workload.workers, steps.tolist(), workload.period, speed=1 / costs
    )


def run_asynchronous(
    problem: StragglerProblem, trace: asynchronous.EventTrace, seeds: int
) -> Trajectory:
    """Runs Algorithm 2 on a virtual clock.

    Args:
      problem: the problem.
      trace: the events, from `event_trace`.
      seeds: R.

    Returns:
      The aggregate after every 4K updates.
    """
    update_times = trace.time[trace.kind == asynchronous.EventKind.APPLY]
    spacing = ROUNDS_PER_POINT * problem.workload.workers
    count = len(update_times) // spacing
    indices = _sample_indices(problem, int(trace.step.max()), seeds)

    @jax.jit
    def run(examples: Examples, indices: jax.Array) -> jax.Array:
        aggregation = asynchronous.with_snapshots(count=count, every=spacing)
        algorithm = _algorithm(problem, examples)
        cluster = asynchronous.simulate(algorithm, trace, aggregation)
        state, _ = cluster.run(cluster.init(_initial_params(problem)), indices)
        return state.aggregation_state.snapshots

    points = [np.asarray(run(problem.examples, of_seed)) for of_seed in indices]
    return Trajectory(update_times[spacing - 1 :: spacing][:count], np.stack(points))


class RealTimeRunners(NamedTuple):
    """Both algorithms in real time, compiled.

    Attributes:
      synchronous: `synchronous(costs, seed) -> trajectory`, x̄ after every fourth round.
      asynchronous: `asynchronous(costs, seed) -> trajectory`, the aggregate after every
        4K updates.
    """

    synchronous: Callable[..., Trajectory]
    asynchronous: Callable[..., Trajectory]


def on_local_devices(
    problem: StragglerProblem, seconds_per_unit: float, mesh: Mesh
) -> RealTimeRunners:
    """Places both algorithms on devices of this host, with injected delays.

    After its local steps a device sleeps until they have taken the time of their costs.
    Algorithm 1 sleeps for the time of its slowest worker; in Algorithm 2 every thread
    sleeps independently.

    Args:
      problem: the problem, with one step size.
      seconds_per_unit: seconds of a step of cost 1.
      mesh: the devices; their number divides K.

    Returns:
      Both runners; their costs have shape `(K,)`.
    """
    round_seconds = problem.workload.period * seconds_per_unit
    runners = RealTimeRunners(
        _synchronous_runner(problem, round_seconds, mesh),
        _asynchronous_runner(problem, round_seconds, mesh),
    )
    for runner in runners:
        runner(np.ones(problem.workload.workers), 0, ROUNDS_PER_POINT)  # Compiles.
    return runners


def _synchronous_runner(
    problem: StragglerProblem, round_seconds: float, mesh: Mesh
) -> Callable[..., Trajectory]:
    """Returns the runner of Algorithm 1; a round of cost 1 lasts `round_seconds`."""
    algorithm = _algorithm(problem, problem.examples)
    cluster = lsgd.on_mesh(algorithm, mesh, problem.workload.workers)
    one_round = jax.jit(lsgd.fused(cluster), donate_argnums=0)

    def run(costs: np.ndarray, seed: int, rounds: int | None = None) -> Trajectory:
        state, times, points = cluster.init(_initial_params(problem)), [], []
        start = time.perf_counter()
        for round_number, batches in enumerate(_rounds(problem, seed, rounds), 1):
            round_start = time.perf_counter()
            state, _ = one_round(state, cluster.shard_batch(batches, time=True))
            jax.block_until_ready(state)
            elapsed = time.perf_counter() - round_start
            time.sleep(max(0.0, costs.max() * round_seconds - elapsed))
            if round_number % ROUNDS_PER_POINT == 0:
                times.append(time.perf_counter() - start)
                points.append(state.workers.params[0])
        return Trajectory(np.array(times), np.stack(points)[None])

    return run


def _asynchronous_runner(
    problem: StragglerProblem, round_seconds: float, mesh: Mesh
) -> Callable[..., Trajectory]:
    """Returns the runner of Algorithm 2; a round of cost 1 lasts `round_seconds`."""
    workers, period, _, steps = problem.workload
    spacing = ROUNDS_PER_POINT * workers
    count = steps // period // ROUNDS_PER_POINT
    cluster = asynchronous.on_threads(
        _algorithm(problem, problem.examples),
        np.resize(mesh.devices, workers).tolist(),
        asynchronous.with_snapshots(count=count, every=spacing),
    )

    def run(costs: np.ndarray, seed: int, rounds: int | None = None) -> Trajectory:
        state, history = cluster.run(
            cluster.init(_initial_params(problem)),
            (step for batches in _rounds(problem, seed, rounds) for step in batches),
            schedule=period,
            delay_fn=lambda k, spent: max(0.0, costs[k] * round_seconds - spent),
        )
        times = history["seconds"][spacing - 1 :: spacing][:count]
        snapshots = np.asarray(state.aggregation_state.snapshots)
        return Trajectory(times, snapshots[None, : len(times)])

    return run


def _sample_indices(problem: StragglerProblem, steps: int, seeds: int) -> np.ndarray:
    """Samples the examples of each local step, with replacement.

    Returns int32 indices `(R, T, K, b)`; those of a longer run start with those of a
    shorter one.
    """
    count = problem.dataset.examples
    shape = (steps, problem.workload.workers, problem.workload.batch)
    samples = [np.random.default_rng(s).integers(0, count, shape) for s in range(seeds)]
    return np.array(samples, np.int32)


def _rounds(
    problem: StragglerProblem, seed: int, rounds: int | None
) -> Iterator[np.ndarray]:
    """Yields the indices of the examples of each round, `(H, K, b)`."""
    period = problem.workload.period
    rounds = rounds or problem.workload.steps // period
    indices = _sample_indices(problem, rounds * period, seed + 1)[seed]
    yield from indices.reshape(rounds, period, *indices.shape[1:])


def _algorithm(problem: StragglerProblem, examples: Examples) -> lsgd.Algorithm:
    """Returns local SGD for all step sizes at once; a batch is indices `(b,)`."""
    loss = logistic.loss_fn(problem.dataset)

    def losses(rows: jax.Array, indices: jax.Array) -> jax.Array:
        features = examples.features[indices].astype(jnp.float32)
        batch = features, examples.labels[indices]
        return jnp.sum(jax.vmap(loss, (0, None))(rows, batch))

    optimizer = per_row_sgd(problem.sizes, problem.dataset.examples)
    return lsgd.local_sgd(losses, optimizer)


def _initial_params(problem: StragglerProblem) -> jax.Array:
    """Returns x₀ = 0 for every step size, `(S, d)`."""
    return jnp.zeros((len(problem.sizes.scale), problem.dataset.dimension))
