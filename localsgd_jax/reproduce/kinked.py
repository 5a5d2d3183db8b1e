"""A strongly convex problem with known constants on which local steps cost something.

    f(x) = Σⱼ φ(xⱼ),   φ(x) = ½μx² for x > 0, ½Lx² else;   x* = 0, f* = 0

A sample adds −ξᵀx with ξ = ±1 for each coordinate: E‖∇fᵢ − ∇f‖² = d exactly. The
kink matters: on a quadratic the workers' mean takes the same path for every period.
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


class Run(NamedTuple):
    """A run, as in `theory.Run`, and the dimension d."""

    workers: int
    period: int
    steps: int
    batch: int
    dimension: int


class Error(NamedTuple):
    """f(x̂_T) − f* per coordinate, and its standard error over coordinates."""

    mean: float
    deviation: float


def curvature(x: jax.Array) -> jax.Array:
    """Returns φ″.

    Args:
      x: anywhere.

    Returns:
      μ or L for each coordinate.
    """
    return jnp.where(x > 0, MU, SMOOTHNESS)


def loss(x: jax.Array, noise: jax.Array) -> jax.Array:
    """The loss of a batch.

    Args:
      x: `(d,)`.
      noise: mean of the ξ of a batch, `(d,)`.

    Returns:
      f(x) − ξᵀx.
    """
    return jnp.sum(curvature(x) / 2 * x**2) - noise @ x


def signs(key: jax.Array, shape: tuple[int, ...], batch: int) -> jax.Array:
    """Draws means of b independent signs.

    Args:
      key: of the step.
      shape: of the result.
      batch: b, at most 32.

    Returns:
      Numbers of mean 0 and variance 1/b.
    """
    width = next(w for w in (8, 16, 32) if batch <= w)
    bits = jax.random.bits(key, shape, f"uint{width}")
    ones = jax.lax.population_count(bits >> (width - batch))
    return 2 * ones.astype(jnp.float32) / batch - 1


def error(run: Run, seed: int = 0) -> Error:
    """Runs local SGD from x* with the stepsize and the output of Theorem 2.2.

    From the minimum all of the error is noise and drift, and every coordinate is an
    independent repetition. Runs that differ in the period only share their noise.

    Args:
      run: what to run.
      seed: of the noise.

    Returns:
      The error.
    """
    a = theory.shift(MU, SMOOTHNESS, run.period)
    scalars = jnp.int32(run.period), jnp.int32(run.steps), jnp.float32(a)
    x = _program(run.workers, run.batch, run.dimension)(seed, *scalars)
    gaps = curvature(x) / 2 * x**2
    return Error(float(gaps.mean()), float(gaps.std() / run.dimension**0.5))


@cache
def _program(workers: int, batch: int, dimension: int) -> Callable:
    """Makes the program that returns x̂_T; H and T are arguments."""

    @jax.jit
    def output(
        seed: jax.Array, period: jax.Array, steps: jax.Array, a: jax.Array
    ) -> jax.Array:
        cluster, average = _local_sgd(workers, a)
        step = lsgd.gated(cluster, lambda t: t % period == 0)
        draw = partial(signs, shape=(workers, dimension), batch=batch)

        def body(carry: tuple) -> tuple:
            state, averaged = carry
            averaged = average.update(averaged, state.workers.params.mean(axis=0))
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            return step(state, draw(key))[0], averaged

        zeros = jnp.zeros(dimension)
        start = cluster.init(zeros), average.init(zeros)
        end = jax.lax.while_loop(lambda carry: carry[0].step < steps, body, start)
        return end[1].mean

    return output


def _local_sgd(workers: int, a: jax.Array) -> tuple:
    """Returns the cluster and the average of the theorem, for a traced shift."""

    def rate(count: Any) -> Any:
        return 4 / (MU * (a + count))

    algorithm = lsgd.local_sgd(loss, optax.sgd(rate), lsgd.average())
    # Weights relative to the first keep float32 sums in range.
    average = theory.running_average(lambda step: (1 + step / a) ** 2)
    return lsgd.simulate(algorithm, workers), average
