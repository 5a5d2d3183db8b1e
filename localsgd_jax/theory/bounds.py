"""Error bounds of Stich 2019: Theorems 2.2 and 5.1, Corollary 2.3."""

import math

from localsgd_jax.core.validation import (
    MAX_INT64,
    check,
    check_int,
    check_number,
    check_type,
)
from localsgd_jax.theory.averages import weight_sum
from localsgd_jax.theory.constants import (
    BoundTerms,
    Constants,
    RunParameters,
    check_parameters,
)


def bound(
    constants: Constants, run: RunParameters, distance: float, a: float
) -> BoundTerms:
    """Bounds the error of local SGD (Theorem 2.2).

        E f(x̂_T) − f* ≤ (μa³/(2S_T)) ‖x₀ − x*‖² + (4T(T + 2a)/(μKS_T)) σ²/b
                        + (256T/(μ²S_T)) G²H²L

    Assumes `stepsize(mu, a)` and the output x̂_T with `weights(a)`, over all workers.

    Args:
      constants, run: constants of the problem and parameters of the run.
      distance: ‖x₀ − x*‖².
      a: shift, above max{16κ, H}.

    Returns:
      The three terms; their `sum` is the bound.

    Raises:
      ValueError: if a ≤ max{16κ, H}, H > T, or a constant is out of range.

    Example:
      >>> run = RunParameters(workers=4, period=4, steps=1000)
      >>> round(sum(bound(Constants(1.0, 1.0, 1.0, 1.0), run, distance=1.0, a=17)), 8)
      0.01465974

    References:
      Stich 2019, Theorem 2.2.
    """
    return _bound("bound", constants, run, distance, a)


def one_shot_bound(
    constants: Constants, run: RunParameters, distance: float, a: float
) -> BoundTerms:
    """Bounds the error of one-shot averaging: Theorem 2.2 with H = T.

    The bound does not vanish: with a just above T, the smallest allowed value, the
    drift term tends to (768/7)κG²/μ for all K and T. This is a limit of the proof; the
    error of one-shot averaging may be smaller.

    Args:
      constants, run: constants of the problem and parameters of the run; the period
        is not used.
      distance: ‖x₀ − x*‖².
      a: shift, above max{16κ, T}.

    Returns:
      The three terms; their `sum` is the bound.

    Raises:
      ValueError: if a ≤ max{16κ, T}, or a constant is out of range.

    Example:
      >>> run = RunParameters(workers=8, period=1, steps=10**6)
      >>> terms = one_shot_bound(Constants(1.0, 1.0, 1.0, 1.0), run, 1.0, a=10**6 + 1)
      >>> round(terms.drift, 2), round(768 / 7, 2)
      (109.71, 109.71)

    References:
      Stich 2019, Theorem 2.2.
    """
    check_type("one_shot_bound(run)", "run", run, RunParameters)
    one_round = run._replace(period=run.steps)
    return _bound("one_shot_bound", constants, one_round, distance, a)


def rate(constants: Constants, run: RunParameters) -> BoundTerms:
    """Bounds the error without x₀ and S_T (Corollary 2.3).

        E f(x̂_T) − f* ≤ (12/(μKT) + 24a/(μKT²)) σ²/b + (768κH²/(μT²)) G²
                        + (6a³/(μT³)) G²,  a = max{16κ, H}

    Published as O(·): these constants follow from Theorem 2.2 with S_T ≥ T³/3 and
    ‖x₀ − x*‖ ≤ 2G/μ. The first term dominates if H = O(√(T/(Kb))): linear speedup.

    Args:
      constants, run: constants of the problem and parameters of the run.

    Returns:
      The three terms; their `sum` is the bound.

    Raises:
      ValueError: if H > T, or a constant is out of range.

    Example:
      >>> run = RunParameters(workers=4, period=4, steps=1000)
      >>> round(sum(rate(Constants(1.0, 1.0, 1.0, 1.0), run)), 8)
      0.01540858

    References:
      Stich 2019, Corollary 2.3.
    """
    check_parameters("rate", constants, run)
    mu, smoothness, variance, second_moment = constants
    workers, period, steps, batch = run
    kappa = smoothness / mu
    a = max(16 * kappa, period)
    noise = 12 / (mu * workers * steps) + 24 * a / (mu * workers * steps**2)
    return BoundTerms(
        initial=6 * a**3 / (mu * steps**3) * second_moment,
        noise=noise * variance / batch,
        drift=768 * kappa * period**2 / (mu * steps**2) * second_moment,
    )


def longest_period(constants: Constants, run: RunParameters, a: float) -> int:
    """Returns the largest H with linear speedup: drift term ≤ noise term.

        H = ⌊√(σ²(T + 2a)/(64κKbG²))⌋ = O(√(T/(Kb))),  1 ≤ H ≤ T, H < a

    At least 1, since workers that are averaged after every step do not drift.

    Args:
      constants, run: constants of the problem and parameters of the run; the period
        is not used.
      a: shift, above 16κ.

    Returns:
      The period H.

    Raises:
      ValueError: if a ≤ 16κ, G² = 0, or a constant is out of range.

    Example:
      >>> run = RunParameters(workers=4, period=1, steps=10**6)
      >>> longest_period(Constants(1.0, 1.0, 1.0, 1.0), run, a=100)
      62

    References:
      Stich 2019, Corollary 2.3; the constant from Theorem 2.2's terms.
    """
    call, name = "longest_period(constants)", "second_moment"
    check_type(call, "constants", constants, Constants)
    check_type("longest_period(run)", "run", run, RunParameters)
    check_number(call, name, constants.second_moment, above=0)
    terms = _bound("longest_period", constants, run._replace(period=1), 0.0, a)
    balanced = math.floor(math.sqrt(terms.noise / terms.drift))
    return max(1, min(balanced, run.steps, math.ceil(a) - 1))


def asynchronous_bound(
    constants: Constants,
    run: RunParameters,
    distance: float,
    a: float,
    delay: int,
    coefficient: float = 768,
) -> BoundTerms:
    """Bounds the error of asynchronous local SGD (Theorem 5.1).

        E f(x̂_T) − f* ≤ (μa³/(2S_T)) ‖x₀ − x*‖² + (4T(T + 2a)/(μKS_T)) σ²/b
                        + (768T/(μ²S_T)) G²(H + τ)²L

    The 768 is quoted, not verified. Derived here: since ηₜ₋ₘ ≤ (1 + m/a)ηₜ, the
    mean x̄ₜ of all steps done and a worker's copy differ in root mean square by

        ηₜG (2 Σ_{1≤m<H} (1 + m/a) + Σ_{H≤m<H+n} (1 + m/a)),

    where a worker's own steps since its last read count twice, and the steps that
    were missing in that read count once. If every step reaches the shared copy within
    τ steps, n = τ and the sum is at most 3(H + τ): 64·3² = 576 is proved, so that 768
    holds. If τ counts from the write, up to H − 1 steps later, n = H + τ − 1 and the
    sum is at most 5.5(H + τ): 64·5.5² = 1936 is proved.

    Args:
      constants, run: constants of the problem and parameters of the run.
      distance: ‖x₀ − x*‖².
      a: shift, above max{16κ, H + τ}.
      delay: τ.
      coefficient: the constant of the drift term, 768 in the equation.

    Returns:
      The three terms; their `sum` is the bound.

    Raises:
      ValueError: if τ < 0, a ≤ max{16κ, H + τ}, H + τ > T, or a constant is out
        of range.

    Example:
      >>> run = RunParameters(workers=4, period=2, steps=1000)
      >>> ones = Constants(1.0, 1.0, 1.0, 1.0)
      >>> round(asynchronous_bound(ones, run, distance=1.0, a=17, delay=2).drift, 8)
      0.03509799

    References:
      Stich 2019, Theorem 5.1.
    """
    call, name = "asynchronous_bound", "coefficient"
    check_int(f"{call}(delay)", "delay", delay, 0, MAX_INT64)
    check_number(f"{call}({name})", name, coefficient, at_least=0)
    check_parameters(call, constants, run)
    effective_period = run.period + delay
    rule = f"period + delay must be at most steps = {run.steps}"
    in_run = effective_period <= run.steps
    check(in_run, f"{call}(period, delay)", rule, run.period, delay)
    delayed = run._replace(period=effective_period)
    terms = _bound(call, constants, delayed, distance, a)
    return terms._replace(drift=coefficient / 256 * terms.drift)


def _bound(
    call: str, constants: Constants, run: RunParameters, distance: float, a: float
) -> BoundTerms:
    """Returns the bound of Theorem 2.2; messages name `call`."""
    check_parameters(call, constants, run)
    mu, smoothness, variance, second_moment = constants
    workers, period, steps, batch = run
    check_number(f"{call}(distance)", "distance", distance, at_least=0)
    check_number(f"{call}(a)", "a", a)
    min_shift = max(16 * smoothness / mu, period)
    check(
        a > min_shift, f"{call}(a)", f"a must exceed max(16 kappa, H) = {min_shift}", a
    )
    total = weight_sum(steps, a)
    return BoundTerms(
        initial=mu * a**3 / (2 * total) * distance,
        noise=4 * steps * (steps + 2 * a) / (mu * workers * total) * variance / batch,
        drift=256 * steps / (mu**2 * total) * second_moment * period**2 * smoothness,
    )
