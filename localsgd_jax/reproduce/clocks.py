"""Algorithms 1 and 2 under stragglers, on a virtual clock and on the real one.

Every path is what the model was and when: Algorithm 1 ends a round when its slowest
worker has, Algorithm 2 has a point after every K writes.
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
from localsgd_jax.asynchronous.events import ARRIVE
from localsgd_jax.experiments import logistic
from localsgd_jax.experiments.datasets import Dataset
from localsgd_jax.reproduce.grid import Examples
from localsgd_jax.reproduce.step_sizes import StepSizes, per_row_sgd

# Rounds between two looks: in Algorithm 2 each one kept costs time at every event.
SPACING = 4


class Problem(NamedTuple):
    """The data set, on the host and on the device."""

    dataset: Dataset
    examples: Examples


class Race(NamedTuple):
    """What both algorithms do.

    Attributes:
      workers: K.
      period: H.
      batch: b.
      steps: local steps of each worker if all take equally many.
    """

    workers: int
    period: int
    batch: int
    steps: int


class Path(NamedTuple):
    """The model at n times.

    Attributes:
      times: `(n,)`, increasing.
      points: `(R, n, S, d)` for R seeds and S step sizes.
    """

    times: np.ndarray
    points: np.ndarray


def slow_one(race: Race, factor: float) -> np.ndarray:
    """Returns the time of a step where one worker is slower than the others.

    Args:
      race: gives K.
      factor: how many times slower.

    Returns:
      `(K,)` units of time.

    Example:
      >>> slow_one(Race(workers=3, period=1, batch=1, steps=1), 4)
      array([4., 1., 1.])
    """
    costs = np.ones(race.workers)
    costs[0] = factor
    return costs


def random_costs(race: Race, seed: int = 0) -> np.ndarray:
    """Draws the time of each step: independent and exponential with mean 1.

    Args:
      race: gives T and K.
      seed: of the draws.

    Returns:
      `(T, K)` units of time.
    """
    return 1 / asynchronous.random_speeds(race.workers, race.steps, 1.0, seed=seed)


def draw(problem: Problem, race: Race, steps: int, seeds: int) -> np.ndarray:
    """Draws the examples of each local step, with replacement.

    Args:
      problem: from which.
      race: gives K and b.
      steps: T.
      seeds: R.

    Returns:
      Indices `(R, T, K, b)`, int32; a longer run begins like a shorter one.
    """
    most, shape = problem.dataset.examples, (steps, race.workers, race.batch)
    draws = [np.random.default_rng(s).integers(0, most, shape) for s in range(seeds)]
    return np.array(draws, np.int32)


def synchronous(
    problem: Problem, sizes: StepSizes, race: Race, costs: np.ndarray, seeds: int
) -> Path:
    """Runs Algorithm 1 and charges each round with its slowest worker.

    Args:
      problem: examples and loss.
      sizes: S step sizes.
      race: K, H, b and T.
      costs: time of a step, `(K,)` or `(T, K)`.
      seeds: R.

    Returns:
      x̄ after every fourth round.
    """
    rounds = race.steps // race.period // SPACING * SPACING
    indices = draw(problem, race, rounds * race.period, seeds)

    @jax.jit
    def run(examples: Examples, indices: jax.Array) -> jax.Array:
        cluster = lsgd.simulate(_algorithm(problem, examples, sizes), race.workers)
        one_round = lsgd.fused(cluster)

        def body(state: lsgd.State, chosen: jax.Array) -> tuple[lsgd.State, jax.Array]:
            state, _ = one_round(state, chosen)
            return state, state.workers.params[0]

        start = cluster.init(_zeros(examples, sizes))
        return jax.lax.scan(body, start, indices)[1]

    in_rounds = indices.reshape(seeds, rounds, race.period, *indices.shape[2:])
    paths = [np.asarray(run(problem.examples, mine)) for mine in in_rounds]
    all_costs = np.broadcast_to(costs, (rounds * race.period, race.workers))
    slowest = all_costs.reshape(rounds, race.period, -1).sum(axis=1).max(axis=1)
    looks = slice(SPACING - 1, None, SPACING)
    return Path(np.cumsum(slowest)[looks], np.stack(paths)[:, looks])


def events(race: Race, costs: np.ndarray) -> asynchronous.Events:
    """Orders a run of Algorithm 2 with as many local steps in all as Algorithm 1's.

    Args:
      race: K, H and T.
      costs: time of a step, `(K,)` or `(T, K)`.

    Returns:
      The events; a slow worker takes fewer steps and the others more.
    """
    share = 1 / costs if costs.ndim == 1 else np.ones(race.workers)
    steps = np.rint(race.steps * race.workers * share / share.sum()).astype(int)
    return asynchronous.order(
        race.workers, steps.tolist(), race.period, speed=1 / costs
    )


def free(
    problem: Problem,
    sizes: StepSizes,
    race: Race,
    order: asynchronous.Events,
    seeds: int,
) -> Path:
    """Runs Algorithm 2.

    Args:
      problem: examples and loss.
      sizes: S step sizes.
      race: K, H, b and T.
      order: from `events`.
      seeds: R.

    Returns:
      The aggregate after every 4K writes.
    """
    arrivals, spacing = order.time[order.kind == ARRIVE], SPACING * race.workers
    count = len(arrivals) // spacing
    indices = draw(problem, race, int(order.step.max()), seeds)

    @jax.jit
    def run(examples: Examples, indices: jax.Array) -> jax.Array:
        place = asynchronous.simulate(
            _algorithm(problem, examples, sizes),
            order,
            asynchronous.recorded(count=count, every=spacing),
        )
        state, _ = place.run(place.init(_zeros(examples, sizes)), indices)
        return state.memory.points

    paths = [np.asarray(run(problem.examples, mine)) for mine in indices]
    return Path(arrivals[spacing - 1 :: spacing][:count], np.stack(paths))


class Hosts(NamedTuple):
    """Both algorithms on the real clock, compiled.

    Attributes:
      synchronous: `synchronous(costs, seed) -> path`, x̄ after every fourth round.
      free: `free(costs, seed) -> path`, the aggregate after every 4K writes.
    """

    synchronous: Callable[[np.ndarray, int], Path]
    free: Callable[[np.ndarray, int], Path]


def hosts(
    problem: Problem, sizes: StepSizes, race: Race, unit: float, mesh: Mesh
) -> Hosts:
    """Puts both algorithms on devices of this host.

    A device sleeps after its local steps until they have lasted as long as its steps
    are said to cost. Algorithm 1 sleeps until its slowest worker is ready, Algorithm 2
    lets every thread sleep for itself.

    Args:
      problem: examples and loss.
      sizes: one step size.
      race: K, H, b and T.
      unit: seconds of a step of cost 1.
      mesh: the devices, a divisor of K.

    Returns:
      Both; costs are `(K,)` there.
    """
    algorithm = _algorithm(problem, problem.examples, sizes)
    start = _zeros(problem.examples, sizes)

    cluster = lsgd.on_mesh(algorithm, mesh, race.workers)
    one_round = jax.jit(lsgd.fused(cluster), donate_argnums=0)

    def synchronous(costs: np.ndarray, seed: int, race: Race = race) -> Path:
        state, times, points = cluster.init(start), [], []
        began = time.perf_counter()
        for done, chosen in enumerate(_rounds(problem, race, seed), 1):
            entered = time.perf_counter()
            state, _ = one_round(state, cluster.put(chosen, time=True))
            jax.block_until_ready(state)
            _sleep(costs.max() * race.period * unit - (time.perf_counter() - entered))
            if done % SPACING == 0:
                times.append(time.perf_counter() - began)
                points.append(state.workers.params[0])
        return Path(np.array(times), np.stack(points)[None])

    spacing = SPACING * race.workers
    count = race.steps // race.period // SPACING
    watched = asynchronous.recorded(count=count, every=spacing)
    devices = np.resize(mesh.devices, race.workers).tolist()
    place = asynchronous.on_threads(algorithm, devices, watched)

    def free(costs: np.ndarray, seed: int, race: Race = race) -> Path:
        def pause(worker: int, seconds: float) -> float:
            return max(0.0, costs[worker] * race.period * unit - seconds)

        batches = (step for chosen in _rounds(problem, race, seed) for step in chosen)
        state, history = place.run(
            place.init(start), batches, every=race.period, pause=pause
        )
        times = history["seconds"][spacing - 1 :: spacing][:count]
        return Path(times, np.asarray(state.memory.points)[None, : len(times)])

    for run in (synchronous, free):
        run(np.ones(race.workers), 0, race._replace(steps=SPACING * race.period))
    return Hosts(synchronous, free)


def _rounds(problem: Problem, race: Race, seed: int) -> Iterator[np.ndarray]:
    """Yields the examples of each round, (H, K, b)."""
    indices = draw(problem, race, race.steps, seed + 1)[seed]
    for first in range(0, race.steps // race.period * race.period, race.period):
        yield indices[first : first + race.period]


def _algorithm(
    problem: Problem, examples: Examples, sizes: StepSizes
) -> lsgd.Algorithm:
    """Returns local SGD for all step sizes at once; a batch is indices (b,)."""
    loss = logistic.loss_fn(problem.dataset)

    def losses(rows: jax.Array, chosen: jax.Array) -> jax.Array:
        features = examples.features[chosen].astype(jnp.float32)
        batch = features, examples.labels[chosen]
        return jnp.sum(jax.vmap(loss, (0, None))(rows, batch))

    optimizer = per_row_sgd(sizes, problem.dataset.examples)
    return lsgd.local_sgd(losses, optimizer, lsgd.average())


def _zeros(examples: Examples, sizes: StepSizes) -> jax.Array:
    """Returns where all start, (S, d)."""
    return jnp.zeros((len(sizes.scale), examples.features.shape[1]))


def _sleep(seconds: float) -> None:
    """Sleeps if there is time left."""
    if seconds > 0:
        time.sleep(seconds)
