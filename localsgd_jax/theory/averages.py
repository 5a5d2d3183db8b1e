"""Step sizes and weighted iterate averages of the theorems."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from localsgd_jax.core.pytrees import accumulation_dtype
from localsgd_jax.core.validation import (
    MAX_INT64,
    check_int,
    check_number,
    check_type,
)
from localsgd_jax.theory.constants import check_curvature


def stepsize(mu: float, a: float) -> optax.Schedule:
    """Returns the step size of the theorems as an optax schedule.

        ηₜ = 4/(μ(a + t))

    Args:
      mu: strong convexity μ.
      a: shift; see `shift`.

    Returns:
      A function of t, a Python int or a traced integer.

    Raises:
      ValueError: if μ ≤ 0 or a ≤ 1.

    Example:
      >>> stepsize(mu=2.0, a=50)(150)
      0.01

    References:
      Stich 2019, Theorem 2.2.
    """
    mu = check_number("stepsize(mu)", "mu", mu, above=0)
    a = check_number("stepsize(a)", "a", a, above=1)
    return lambda count: 4.0 / (mu * (a + count))


def shift(mu: float, smoothness: float, period: int, delay: int = 0) -> int:
    """Returns the smallest integer shift that the theorems allow.

        a > max{16κ, H + τ}

    a > 16κ makes η₀ < 1/(4L), which Lemma 3.1 needs; a > H makes ηₜ ≤ 2 ηₜ₊ₕ, which
    Lemma 3.3 needs.

    Args:
      mu, smoothness: μ and L.
      period, delay: H and, if asynchronous, τ.

    Returns:
      The shift a.

    Raises:
      ValueError: if μ ≤ 0, L < μ, H < 1 or τ < 0.

    Example:
      >>> shift(mu=1.0, smoothness=1.0, period=4)
      17

    References:
      Stich 2019, Theorems 2.2 and 5.1.
    """
    check_curvature("shift", mu, smoothness)
    check_int("shift(period)", "period", period, 1, MAX_INT64)
    check_int("shift(delay)", "delay", delay, 0, MAX_INT64)
    return math.floor(max(16 * smoothness / mu, period + delay)) + 1


def weights(a: float, power: int = 2) -> optax.Schedule:
    """Returns the weights of an averaged output.

        wₜ = (a + t)ᵖ

    p = 2 with the shift of the step size gives the output of the theorems, p = 1 with
    a = 1 the linearly weighted average, p = 0 the uniform average.

    Args:
      a: shift.
      power: p.

    Returns:
      A function of t, a Python int or a traced integer.

    Raises:
      ValueError: if a ≤ 0 or p < 0.

    Example:
      >>> [weights(a=3)(t) for t in range(3)]
      [9.0, 16.0, 25.0]

    References:
      Stich 2019, Theorem 2.2.
    """
    a = check_number("weights(a)", "a", a, above=0)
    power = check_number("weights(power)", "power", power, at_least=0)
    # A float, because a² exceeds int32 for a = 16κ of practical problems.
    return lambda count: (float(a) + count) ** power


def weight_sum(steps: int, a: float) -> float:
    """Returns the exact sum of the quadratic weights.

        S_T = Σ_{t=0}^{T−1} (a + t)² = (T/6)(2T² + 6aT − 3T + 6a² − 6a + 1) ≥ T³/3

    Args:
      steps: T.
      a: shift.

    Returns:
      S_T.

    Raises:
      ValueError: if T < 1 or a < 1.

    Example:
      >>> weight_sum(steps=7, a=3)
      280.0

    References:
      Stich 2019, Lemma 3.4.
    """
    check_int("weight_sum(steps)", "steps", steps, 1, MAX_INT64)
    check_number("weight_sum(a)", "a", a, at_least=1)
    return steps * (2 * steps**2 + 6 * a * steps - 3 * steps + 6 * a**2 - 6 * a + 1) / 6


class AverageState(NamedTuple):
    """State of `running_average`.

    Attributes:
      step: t.
      total: Sₜ, the sum of the weights so far.
      mean: x̂ₜ, the average so far.
    """

    step: jax.Array
    total: jax.Array
    mean: Any


class RunningAverage(NamedTuple):
    """A pair of pure functions that average iterates.

    Attributes:
      init: `init(params) -> state`.
      update: `update(state, params) -> state`.
    """

    init: Callable[[Any], AverageState]
    update: Callable[[AverageState, Any], AverageState]


def running_average(weight: Callable) -> RunningAverage:
    """Averages iterates online with weights wₜ.

        Sₜ₊₁ = Sₜ + wₜ
        x̂ₜ₊₁ = x̂ₜ + (wₜ/Sₜ₊₁)(xₜ − x̂ₜ)

    wₜ is the weight of xₜ, the iterate before step t: call `update` first, then step.
    The output of the theorems is the workers' mean of x̂_T: keep one average per
    worker and take their mean at the end. The average is stored in float32 at least.

    Args:
      weight: function of t; see `weights`.

    Returns:
      `init` and `update`, for any pytree; `state.mean` is the average so far.

    Raises:
      TypeError: if the weight is not callable.

    Example:
      >>> average = running_average(weights(a=3))
      >>> state = average.init(0.0)
      >>> for x in (25.0, 0.0, 9.0):  # (9·25 + 16·0 + 25·9)/50
      ...     state = average.update(state, x)
      >>> float(state.mean)
      9.0

    References:
      Stich 2019, Theorem 2.2.
    """
    check_type("running_average(weight)", "weight", weight, Callable)

    def zeros(x):
        return jnp.zeros_like(x, accumulation_dtype(x))

    def init(params):
        step, total = jnp.zeros((), jnp.int32), jnp.zeros(())
        return AverageState(step, total, jax.tree.map(zeros, params))

    def update(state, params):
        w = weight(state.step)
        total = state.total + w
        ratio = w / total
        mean = jax.tree.map(lambda m, x: m + ratio * (x - m), state.mean, params)
        return AverageState(state.step + 1, total, mean)

    return RunningAverage(init, update)
