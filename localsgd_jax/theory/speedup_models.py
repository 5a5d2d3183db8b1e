"""Speedup models of Stich 2019: communication time against additional steps."""

import math

from localsgd_jax.core.validation import MAX_INT64, check_int, check_number


def speedup(workers: int, period: int, ratio: float, accuracy: float = 0.0) -> float:
    """Returns the modelled speedup over one worker, as published.

        S(K) = K / [(½ + ½√(1 + ε(1 + H + H²K))) (1 + 2ρ(K − 1)/H)]

    ε → 0 leaves the cost of communication alone: S → H/(2ρ) as K → ∞.

    Args:
      workers, period: K and H.
      ratio: ρ, the time to exchange a vector divided by the time of a gradient.
      accuracy: ε, the error to reach.

    Returns:
      S(K).

    Raises:
      ValueError: if K < 1, H < 1, ρ < 0 or ε < 0.

    Example:
      >>> round(speedup(workers=16, period=1024, ratio=25), 2)
      9.24

    References:
      Stich 2019, the speedup model of its experiments.
    """
    _check("speedup", workers, period, ratio, accuracy)
    growth = accuracy * (1 + period + period**2 * workers)
    return _modelled_speedup(workers, period, ratio, growth)


def corrected_speedup(
    workers: int, period: int, ratio: float, accuracy: float = 0.0
) -> float:
    """Returns the modelled speedup with the factor 4K that `speedup` lacks.

        S(K) = K / [(½ + ½√(1 + 4Kε(1 + H + H²K))) (1 + 2ρ(K − 1)/H)]

    Corollary 2.3 with every constant 1 and without its T⁻³ term gives the error after
    T steps,

        ε = 1/(KT) + (1 + H)/(KT²) + H²/T²;

    S(K) is 1/ε divided by the positive root T and by the cost of communication.

    Args:
      workers, period, ratio, accuracy: K, H, ρ and ε, as for `speedup`.

    Returns:
      S(K).

    Raises:
      ValueError: if K < 1, H < 1, ρ < 0 or ε < 0.

    Example:
      >>> corrected_speedup(workers=2, period=1, ratio=0, accuracy=0.25)
      1.0

    References:
      Stich 2019, Corollary 2.3 and the speedup model of its experiments.
    """
    _check("corrected_speedup", workers, period, ratio, accuracy)
    growth = 4 * workers * accuracy * (1 + period + period**2 * workers)
    return _modelled_speedup(workers, period, ratio, growth)


def _check(call: str, workers: int, period: int, ratio: float, accuracy: float) -> None:
    """Raises unless all arguments are numbers in their ranges."""
    check_int(f"{call}(workers)", "workers", workers, 1, MAX_INT64)
    check_int(f"{call}(period)", "period", period, 1, MAX_INT64)
    check_number(f"{call}(ratio)", "ratio", ratio, at_least=0)
    check_number(f"{call}(accuracy)", "accuracy", accuracy, at_least=0)


def _modelled_speedup(workers: int, period: int, ratio: float, growth: float) -> float:
    """Returns the speedup, given the growth of steps under the root."""
    steps = 0.5 + 0.5 * math.sqrt(1 + growth)
    return workers / (steps * (1 + 2 * ratio * (workers - 1) / period))
