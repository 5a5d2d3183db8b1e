"""Local SGD for a whole grid of step sizes and several seeds in one program.

One worker's model is a matrix with a row for every step size, so the grid is batched
by the matrix product; seeds are an outer worker axis over which nobody averages.
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
from localsgd_jax.reproduce.step_sizes import StepSizes, per_row_sgd

OUTPUTS = ("last", "uniform", "linear", "quadratic")


class Examples(NamedTuple):
    """A data set on the device.

    Attributes:
      features: `(n, d)`, int8 if that is exact, else float32.
      labels: `(n,)`, float32.
    """

    features: jax.Array
    labels: jax.Array


class Shape(NamedTuple):
    """How much runs at once: K workers with batches of b, for R seeds."""

    workers: int
    batch: int
    seeds: int


class Walk(NamedTuple):
    """A run under way: the cluster's state and the three averages of x̄ so far."""

    state: lsgd.State
    averages: tuple[theory.AverageState, ...]


class Simulation(NamedTuple):
    """Many runs in one program.

    Attributes:
      start: `start(sizes) -> walk`.
      advance: `advance(walk, sizes, period, until) -> walk`; local steps up to step
        `until`, with a synchronisation after every `period`. Uses up its argument.
      outputs: `outputs(walk)`; the candidates of `OUTPUTS`, `(4, R, S, d)`.
    """

    start: Callable[[StepSizes], Walk]
    advance: Callable[[Walk, StepSizes, int, int], Walk]
    outputs: Callable[[Walk], jax.Array]


def load(dataset: Dataset) -> Examples:
    """Puts a data set on the device.

    Args:
      dataset: any.

    Returns:
      Its examples, dense.
    """
    # Drawing rows is bound by memory: small integers take a quarter of the time.
    with np.errstate(invalid="ignore"):
        small = dataset.features.astype(np.int8)
    exact = np.array_equal(small.data, dataset.features.data)
    stored = small if exact else dataset.features.astype(np.float32)
    return Examples(
        jnp.asarray(stored.toarray()), jnp.asarray(dataset.labels, jnp.float32)
    )


def cluster(dataset: Dataset, sizes: StepSizes, shape: Shape) -> lsgd.Cluster:
    """Puts the workers of all seeds on one device.

    Args:
      dataset: what the loss belongs to.
      sizes: the grid.
      shape: K, b and R.

    Returns:
      A cluster of R·K workers with parameters `(S, d)`, averaged within each seed.
    """
    loss = logistic.loss_fn(dataset)

    def losses(rows: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.sum(jax.vmap(loss, (0, None))(rows, batch))

    optimizer = per_row_sgd(sizes, len(dataset.labels))
    algorithm = lsgd.local_sgd(losses, optimizer, lsgd.average("worker"))
    sides = (shape.seeds, shape.workers)
    return lsgd.simulate(algorithm, sides, axis=("seed", "worker"))


def draw(examples: Examples, step: jax.Array, shape: Shape) -> tuple:
    """Draws the batches of a step, with replacement.

    All step sizes see the same examples. So do two clusters with equal K·b: worker
    k's share are the examples k·b, …, (k + 1)·b − 1 of the step.

    Args:
      examples: from which.
      step: t.
      shape: K, b and R.

    Returns:
      Features `(R·K, b, d)` and labels `(R·K, b)`, float32.
    """

    def indices(seed: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), step)
        most = len(examples.labels)
        return jax.random.randint(key, (shape.workers, shape.batch), 0, most)

    chosen = jax.vmap(indices)(jnp.arange(shape.seeds)).reshape(-1, shape.batch)
    return examples.features[chosen].astype(jnp.float32), examples.labels[chosen]


def simulation(dataset: Dataset, examples: Examples, shape: Shape) -> Simulation:
    """Makes the program that runs a grid; another grid or period is no new program.

    Args:
      dataset: the examples, and what the loss belongs to.
      examples: the same on the device.
      shape: K, b and R.

    Returns:
      A simulation that starts at x = 0.
    """

    size = examples.features.shape[1]

    @partial(jax.jit, donate_argnums=0)
    def walk_on(
        walk: Walk,
        examples: Examples,
        sizes: StepSizes,
        period: jax.Array,
        until: jax.Array,
    ) -> Walk:
        workers = cluster(dataset, sizes, shape)
        step = lsgd.gated(workers, lambda t: t % period == 0)

        def body(walk: Walk) -> Walk:
            mean = _mean(walk.state, shape)
            averages = [
                average.update(state, mean)
                for average, state in zip(_averages(), walk.averages, strict=True)
            ]
            batch = draw(examples, walk.state.step, shape)
            return Walk(step(walk.state, batch)[0], tuple(averages))

        return jax.lax.while_loop(lambda walk: walk.state.step < until, body, walk)

    def start(sizes: StepSizes) -> Walk:
        zeros = jnp.zeros((len(sizes.scale), size))
        mean = jnp.zeros((shape.seeds, *zeros.shape))
        state = cluster(dataset, sizes, shape).init(zeros)
        return Walk(state, tuple(average.init(mean) for average in _averages()))

    def advance(walk: Walk, sizes: StepSizes, period: int, until: int) -> Walk:
        return walk_on(walk, examples, sizes, jnp.int32(period), jnp.int32(until))

    def outputs(walk: Walk) -> jax.Array:
        averages = [average.mean for average in walk.averages]
        return jnp.stack([_mean(walk.state, shape), *averages])

    return Simulation(start, advance, jax.jit(outputs))


def _averages() -> tuple[theory.RunningAverage, ...]:
    """Returns the averages with weights 1, t + 1 and (t + 1)²."""
    return tuple(
        theory.running_average(theory.weights(a=1, power=power)) for power in range(3)
    )


def _mean(state: lsgd.State, shape: Shape) -> jax.Array:
    """Returns x̄ of each seed: (R, S, d)."""
    params = state.workers.params
    return params.reshape(shape.seeds, shape.workers, *params.shape[1:]).mean(axis=1)
