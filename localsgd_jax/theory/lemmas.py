"""Lemmas of the theorems: Lemmas 3.1 to 3.4 of Stich 2019."""

from localsgd_jax.core.validation import MAX_INT64, check, check_int, check_number
from localsgd_jax.theory.averages import weight_sum
from localsgd_jax.theory.constants import BoundTerms, check_curvature


def descent(
    distance: float,
    gap: float,
    variance: float,
    drift: float,
    learning_rate: float,
    mu: float,
    smoothness: float,
) -> float:
    """Bounds the distance of the mean to x* after a step (Lemma 3.1).

        E‖x̄ₜ₊₁ − x*‖² ≤ (1 − μη)‖x̄ₜ − x*‖² + η² E‖g − ḡ‖² − ½η(f(x̄ₜ) − f*)
                        + 2ηL (1/K)Σₖ‖x̄ₜ − xₜᵏ‖²

    Args:
      distance, gap: ‖x̄ₜ − x*‖² and f(x̄ₜ) − f*.
      variance, drift: E‖g − ḡ‖² and (1/K)Σₖ‖x̄ₜ − xₜᵏ‖²; see Lemmas 3.2 and 3.3.
      learning_rate: η = ηₜ, at most 1/(4L).
      mu, smoothness: μ and L.

    Returns:
      The right-hand side.

    Raises:
      ValueError: if μ ≤ 0, L < μ, η > 1/(4L), or a number is negative.

    Example:
      >>> descent(8.0, 1.0, 16.0, 4.0, learning_rate=0.125, mu=1.0, smoothness=2.0)
      9.1875

    References:
      Stich 2019, Lemma 3.1.
    """
    check_curvature("descent", mu, smoothness)
    for name, value in (
        ("distance", distance),
        ("gap", gap),
        ("variance", variance),
        ("drift", drift),
        ("learning_rate", learning_rate),
    ):
        check_number(f"descent({name})", name, value, at_least=0)
    largest = 1 / (4 * smoothness)
    rule = f"learning_rate must be at most 1/(4 smoothness) = {largest}"
    check(learning_rate <= largest, "descent(learning_rate)", rule, learning_rate)
    contracted = (1 - mu * learning_rate) * distance + learning_rate**2 * variance
    return contracted - learning_rate * gap / 2 + 2 * learning_rate * smoothness * drift


def mean_variance(variance: float, workers: int, batch: int = 1) -> float:
    """Bounds the variance of the workers' mean gradient (Lemma 3.2).

        E‖g − ḡ‖² ≤ σ²/(Kb)

    Args:
      variance: σ².
      workers, batch: K and b; all K·b samples are drawn independently.

    Returns:
      The right-hand side.

    Raises:
      ValueError: if σ² < 0, K < 1 or b < 1.

    Example:
      >>> mean_variance(8.0, workers=4, batch=2)
      1.0

    References:
      Stich 2019, Lemma 3.2.
    """
    check_number("mean_variance(variance)", "variance", variance, at_least=0)
    check_int("mean_variance(workers)", "workers", workers, 1, MAX_INT64)
    check_int("mean_variance(batch)", "batch", batch, 1, MAX_INT64)
    return variance / (workers * batch)


def drift(learning_rate: float, second_moment: float, period: int) -> float:
    """Bounds the mean squared distance of workers to their mean (Lemma 3.3).

        (1/K)Σₖ E‖x̄ₜ − xₜᵏ‖² ≤ 4 ηₜ² G² H²

    Assumes that η is non-increasing and ηₜ ≤ 2 ηₜ₊ₕ, but neither smoothness nor
    convexity. The factor 4: since the last synchronisation s a worker has added fewer
    than H steps, each at most ηₛG in root mean square, so its drift is below ηₛ²G²H²,
    and ηₛ ≤ 2ηₜ enters squared. Workers that move in opposite directions are a
    counterexample to a factor of 2, and only 4 gives the 256 = 64·4 of Theorem 2.2.

    Args:
      learning_rate: ηₜ.
      second_moment: G².
      period: H.

    Returns:
      The right-hand side.

    Raises:
      ValueError: if η < 0, G² < 0 or H < 1.

    Example:
      >>> drift(0.5, second_moment=2.0, period=3)
      18.0

    References:
      Stich 2019, Lemma 3.3.
    """
    name, moment = "learning_rate", "second_moment"
    check_number(f"drift({name})", name, learning_rate, at_least=0)
    check_number(f"drift({moment})", moment, second_moment, at_least=0)
    check_int("drift(period)", "period", period, 1, MAX_INT64)
    return 4 * learning_rate**2 * second_moment * period**2


def telescope(
    first: float, noise: float, drift: float, mu: float, steps: int, a: float
) -> BoundTerms:
    """Unrolls the recursion of the theorems (Lemma 3.4).

    If rₜ₊₁ ≤ (1 − μηₜ)rₜ − ηₜAeₜ + ηₜ²B + ηₜ³C with rₜ, eₜ ≥ 0 and ηₜ = 4/(μ(a + t)):

        (A/S_T) Σₜ wₜeₜ ≤ (μa³/(4S_T)) r₀ + (2T(T + 2a)/(μS_T)) B + (16T/(μ²S_T)) C

    A = ½, B = σ²/(Kb), C = 8G²H²L, from Lemmas 3.1 to 3.3, give Theorem 2.2.

    Args:
      first, noise, drift: r₀, B and C.
      mu, steps, a: μ, T and the shift.

    Returns:
      The three terms of the right-hand side.

    Raises:
      ValueError: if μ ≤ 0, T < 1, a ≤ 1, or r₀, B or C is negative.

    Example:
      >>> telescope(4.0, 2.0, 10.0, mu=4.0, steps=7, a=3)
      BoundTerms(initial=0.38571428571428573, noise=0.325, drift=0.25)

    References:
      Stich 2019, Lemma 3.4.
    """
    for name, value in (("first", first), ("noise", noise), ("drift", drift)):
        check_number(f"telescope({name})", name, value, at_least=0)
    check_number("telescope(mu)", "mu", mu, above=0)
    check_int("telescope(steps)", "steps", steps, 1, MAX_INT64)
    check_number("telescope(a)", "a", a, above=1)
    total = weight_sum(steps, a)
    return BoundTerms(
        initial=mu * a**3 / (4 * total) * first,
        noise=2 * steps * (steps + 2 * a) / (mu * total) * noise,
        drift=16 * steps / (mu**2 * total) * drift,
    )
