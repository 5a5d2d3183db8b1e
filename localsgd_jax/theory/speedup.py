"""The model of the speedup: communication against the noise of fewer rounds."""

import math

from localsgd_jax.theory.constants import at_least


def speedup(workers: int, period: int, ratio: float, accuracy: float = 0.0) -> float:
    """Models the speedup over one worker, as published.

        S(K) = K / [(½ + ½√(1 + ε(1 + H + H²K))) (1 + 2ρ(K − 1)/H)]

    ε → 0 leaves the price of communication alone: S → H/(2ρ) as K → ∞.

    Args:
      workers, period: K and H.
      ratio: ρ, time to exchange a vector over time of a gradient.
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
    at_least("speedup", 1, workers=workers, period=period)
    at_least("speedup", 0, ratio=ratio, accuracy=accuracy)
    growth = accuracy * (1 + period + period**2 * workers)
    return _modelled_speedup(workers, period, ratio, growth)


def corrected_speedup(
    workers: int, period: int, ratio: float, accuracy: float = 0.0
) -> float:
    """Models the speedup over one worker, with the factor 4K missing in `speedup`.

        S(K) = K / [(½ + ½√(1 + 4Kε(1 + H + H²K))) (1 + 2ρ(K − 1)/H)]

    Corollary 2.3 with every constant 1 and without its T⁻³ asks for T steps,

        ε = 1/(KT) + (1 + H)/(KT²) + H²/T²;

    S(K) is 1/ε over the positive root T and over the price of communication.

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
    at_least("corrected_speedup", 1, workers=workers, period=period)
    at_least("corrected_speedup", 0, ratio=ratio, accuracy=accuracy)
    growth = 4 * workers * accuracy * (1 + period + period**2 * workers)
    return _modelled_speedup(workers, period, ratio, growth)


def _modelled_speedup(workers, period, ratio, growth) -> float:
    """Speedup from the growth of steps under the root and from communication."""
    steps = 0.5 + 0.5 * math.sqrt(1 + growth)
    return workers / (steps * (1 + 2 * ratio * (workers - 1) / period))
