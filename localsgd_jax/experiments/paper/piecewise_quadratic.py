"""Piecewise quadratic test problem with known constants and non-zero client drift.

    f(x) = Σⱼ φ(xⱼ),   φ(x) = ½μx² for x > 0, ½Lx² else;   x* = 0, f* = 0

A sample adds −ξᵀx with ξ = ±1 in each coordinate, so E‖∇fᵢ − ∇f‖² = d exactly. The
kink is necessary: on a quadratic the mean of the workers is the same for every period.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import localsgd_jax as lsgd
from localsgd_jax import theory

MU, SMOOTHNESS = 1.0, 3.0
CONSTANTS = {"mu": MU, "smoothness": SMOOTHNESS}


class GapEstimate(NamedTuple):
    """Mean of f(x̂_T) − f* per coordinate, and its standard error."""

    mean: float
    standard_error: float


def curvature(x: jax.Array) -> jax.Array:
    """Returns φ″(x), that is μ or L for each coordinate."""
    return jnp.where(x > 0, MU, SMOOTHNESS)


def loss(x: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns the loss f(x) − ξᵀx of a batch, with the mean ξ of the batch `(d,)`."""
    return jnp.sum(curvature(x) / 2 * x**2) - noise @ x


def rademacher_means(key: jax.Array, shape: tuple[int, ...], batch: int) -> jax.Array:
    """Samples means of b ≤ 32 independent signs: mean 0 and variance 1/b."""
    width = next(w for w in (8, 16, 32) if batch <= w)
    bits = jax.random.bits(key, shape, f"uint{width}")
    ones = jax.lax.population_count(bits >> (width - batch))
    return 2 * ones.astype(jnp.float32) / batch - 1


def estimate_gap(
    run: theory.RunParameters, dimension: int, seed: int = 0
) -> GapEstimate:
    """Runs local SGD from x* with the stepsize and the average of Theorem 2.2.

    Started at the minimum, the error consists of noise and drift only, and every
    coordinate is an independent repetition. Runs that differ only in the period have
    the same noise.

    Args:
      run: K, H, T and b.
      dimension: d.
      seed: seed of the noise.

    Returns:
      The error.
    """
    a = theory.shift(MU, SMOOTHNESS, run.period)
    scalars = jnp.int32(run.period), jnp.int32(run.steps), jnp.float32(a)
    x = _program(run.workers, run.batch, dimension)(seed, *scalars)
    gaps = curvature(x) / 2 * x**2
    return GapEstimate(float(gaps.mean()), float(gaps.std() / dimension**0.5))


@cache
def _program(workers: int, batch: int, dimension: int) -> Callable:
    """Returns the program that computes x̂_T; H and T are runtime arguments."""

    @jax.jit
    def weighted_average(
        seed: jax.Array, period: jax.Array, steps: jax.Array, a: jax.Array
    ) -> jax.Array:
        cluster, average = _local_sgd(workers, a)
        step = lsgd.gated(cluster, lambda t: t % period == 0)
        sample = partial(rademacher_means, shape=(workers, dimension), batch=batch)

        def body(carry: tuple) -> tuple:
            state, averaged = carry
            averaged = average.update(averaged, state.workers.params.mean(axis=0))
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            return step(state, sample(key))[0], averaged

        zeros = jnp.zeros(dimension)
        start = cluster.init(zeros), average.init(zeros)
        end = jax.lax.while_loop(lambda carry: carry[0].step < steps, body, start)
        return end[1].mean

    return weighted_average


def _local_sgd(workers: int, a: jax.Array) -> tuple:
    """Returns the cluster and the weighted average for a traced shift a."""

    def rate(count: Any) -> Any:
        return 4 / (MU * (a + count))

    algorithm = lsgd.local_sgd(loss, optax.sgd(rate))
    # Weights relative to the first one keep float32 sums in range.
    average = theory.running_average(lambda step: (1 + step / a) ** 2)
    return lsgd.simulate(algorithm, workers), average
