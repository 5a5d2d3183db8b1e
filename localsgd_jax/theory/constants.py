"""Problem constants and run parameters of the bounds, with validation."""

from typing import NamedTuple

from localsgd_jax.core.validation import check, check_min


class Constants(NamedTuple):
    """Constants of an optimisation problem.

    σ² and G² hold along the whole run.

    Attributes:
      mu: strong convexity μ.
      smoothness: smoothness L; κ = L/μ.
      variance: σ² ≥ E‖∇fᵢ(x) − ∇f(x)‖², of one sample i.
      second_moment: G² ≥ E‖∇fᵢ(x)‖², of one sample i.
    """

    mu: float
    smoothness: float
    variance: float
    second_moment: float


class RunParameters(NamedTuple):
    """Parameters of a run of local SGD.

    Attributes:
      workers: K.
      period: H, the largest number of steps between two synchronisations.
      steps: T, of every worker.
      batch: b, samples per worker and step.
    """

    workers: int
    period: int
    steps: int
    batch: int = 1


class BoundTerms(NamedTuple):
    """The three terms of a bound; the bound is their `sum`.

    Attributes:
      initial: term of the initial distance from x₀ to x*.
      noise: term of the sampling noise; it shrinks with more workers.
      drift: term of the drift of workers between synchronisations.
    """

    initial: float
    noise: float
    drift: float


def check_parameters(call: str, constants: Constants, run: RunParameters) -> None:
    """Raises a ValueError if a constant or parameter is out of range."""
    check_curvature(call, constants.mu, constants.smoothness)
    check_min(
        call,
        0,
        variance=constants.variance,
        second_moment=constants.second_moment,
    )
    check_min(call, 1, **run._asdict())
    rule = "period must be at most steps"
    period, steps = run.period, run.steps
    check(period <= steps, f"{call}(period, steps)", rule, period, steps)


def check_curvature(call: str, mu: float, smoothness: float) -> None:
    """Raises a ValueError unless 0 < μ ≤ L."""
    check(mu > 0, f"{call}(mu)", "mu must be positive", mu)
    rule = "mu must be at most smoothness"
    check(mu <= smoothness, f"{call}(mu, smoothness)", rule, mu, smoothness)
