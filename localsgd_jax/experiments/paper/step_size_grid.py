"""Simulation of local SGD for a grid of step sizes and several seeds in one program.

The model of a worker is a matrix with one row per step size, so the grid is batched by
the matrix product. Seeds are an outer worker axis that is not averaged over.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import localsgd_jax as lsgd
from localsgd_jax import theory
from localsgd_jax.experiments import logistic
from localsgd_jax.experiments.datasets import Dataset
from localsgd_jax.experiments.paper.step_sizes import StepSizes, per_row_sgd

OUTPUTS = ("last", "uniform", "linear", "quadratic")


class Examples(NamedTuple):
    """A dataset on the device.

    Attributes:
      features: `(n, d)`, int8 if that is exact, else float32.
      labels: `(n,)`, float32.
    """

    features: jax.Array
    labels: jax.Array


class GridConfig(NamedTuple):
    """K workers with batches of b examples, for R seeds."""

    workers: int
    batch: int
    seeds: int


class GridState(NamedTuple):
    """State of the cluster, and the three weighted averages of x̄ so far."""

    state: lsgd.State
    averages: tuple[theory.AverageState, ...]


class Simulation(NamedTuple):
    """Compiled simulation of a grid of runs.

    Attributes:
      start: `start(sizes) -> grid_state`.
      advance: `advance(grid_state, sizes, period, until) -> grid_state`; local steps up
        to step `until`, with a synchronisation after every `period`. Donates the state.
      outputs: `outputs(grid_state)`; the candidates of `OUTPUTS`, `(4, R, S, d)`.
    """

    start: Callable[[StepSizes], GridState]
    advance: Callable[[GridState, StepSizes, int, int], GridState]
    outputs: Callable[[GridState], jax.Array]


def to_device(dataset: Dataset) -> Examples:
    """Transfers a dataset to the device as dense arrays."""
    # Sampling rows is limited by memory bandwidth: int8 takes a quarter of the time.
    with np.errstate(invalid="ignore"):
        small = dataset.features.astype(np.int8)
    exact = np.array_equal(small.data, dataset.features.data)
    stored = small if exact else dataset.features.astype(np.float32)
    return Examples(
        jnp.asarray(stored.toarray()), jnp.asarray(dataset.labels, jnp.float32)
    )


def grid_cluster(
    dataset: Dataset, sizes: StepSizes, config: GridConfig
) -> lsgd.Cluster:
    """Places the workers of all seeds on one device.

    Args:
      dataset: the dataset of the loss.
      sizes: the grid of step sizes.
      config: K, b and R.

    Returns:
      A cluster of R·K workers with parameters `(S, d)`, averaged within each seed.
    """
    loss = logistic.loss_fn(dataset)

    def losses(rows: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.sum(jax.vmap(loss, (0, None))(rows, batch))

    optimizer = per_row_sgd(sizes, dataset.examples)
    algorithm = lsgd.local_sgd(losses, optimizer, lsgd.average("worker"))
    shape = (config.seeds, config.workers)
    return lsgd.simulate(algorithm, shape, axis=("seed", "worker"))


def sample_batch(examples: Examples, step: jax.Array, config: GridConfig) -> tuple:
    """Samples the batches of a step, with replacement.

    All step sizes use the same examples, and so do two clusters with equal K·b: the
    batch of worker k consists of the samples k·b, …, (k + 1)·b − 1 of the step.

    Args:
      examples: the dataset.
      step: t.
      config: K, b and R.

    Returns:
      Features `(R·K, b, d)` and labels `(R·K, b)`, float32.
    """

    def indices(seed: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), step)
        count = len(examples.labels)
        return jax.random.randint(key, (config.workers, config.batch), 0, count)

    sampled = jax.vmap(indices)(jnp.arange(config.seeds)).reshape(-1, config.batch)
    return examples.features[sampled].astype(jnp.float32), examples.labels[sampled]


def simulation(dataset: Dataset, examples: Examples, config: GridConfig) -> Simulation:
    """Compiles the grid simulation; step sizes and period are runtime arguments.

    Args:
      dataset: the dataset.
      examples: the same on the device.
      config: K, b and R.

    Returns:
      A simulation that starts at x = 0.
    """
    dimension = examples.features.shape[1]

    @partial(jax.jit, donate_argnums=0)
    def advance(
        grid_state: GridState,
        examples: Examples,
        sizes: StepSizes,
        period: jax.Array,
        until: jax.Array,
    ) -> GridState:
        cluster = grid_cluster(dataset, sizes, config)
        step = lsgd.gated(cluster, lambda t: t % period == 0)

        def body(grid_state: GridState) -> GridState:
            mean = _mean(grid_state.state, config)
            averages = [
                average.update(state, mean)
                for average, state in zip(_averages(), grid_state.averages, strict=True)
            ]
            batch = sample_batch(examples, grid_state.state.step, config)
            return GridState(step(grid_state.state, batch)[0], tuple(averages))

        return jax.lax.while_loop(lambda s: s.state.step < until, body, grid_state)

    def start(sizes: StepSizes) -> GridState:
        zeros = jnp.zeros((len(sizes.scale), dimension))
        mean = jnp.zeros((config.seeds, *zeros.shape))
        state = grid_cluster(dataset, sizes, config).init(zeros)
        return GridState(state, tuple(average.init(mean) for average in _averages()))

    def advance_to(
        grid_state: GridState, sizes: StepSizes, period: int, until: int
    ) -> GridState:
        return advance(grid_state, examples, sizes, jnp.int32(period), jnp.int32(until))

    def outputs(grid_state: GridState) -> jax.Array:
        averages = [average.mean for average in grid_state.averages]
        return jnp.stack([_mean(grid_state.state, config), *averages])

    return Simulation(start, advance_to, jax.jit(outputs))


def _averages() -> tuple[theory.RunningAverage, ...]:
    """Returns the averages with weights 1, t + 1 and (t + 1)²."""
    return tuple(
        theory.running_average(theory.weights(a=1, power=power)) for power in range(3)
    )


def _mean(state: lsgd.State, config: GridConfig) -> jax.Array:
    """Returns x̄ of each seed, `(R, S, d)`."""
    params = state.workers.params
    shape = (config.seeds, config.workers, *params.shape[1:])
    return params.reshape(shape).mean(axis=1)
