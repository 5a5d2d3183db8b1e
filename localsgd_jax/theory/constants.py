"""Problem constants and run parameters of the bounds, with validation."""

from typing import NamedTuple

from localsgd_jax.core.validation import (
    MAX_INT64,
    check,
    check_int,
    check_number,
    check_type,
)


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
    """Raises unless all constants and parameters are numbers in their ranges."""
    check_type(f"{call}(constants)", "constants", constants, Constants)
    check_type(f"{call}(run)", "run", run, RunParameters)
    check_curvature(call, constants.mu, constants.smoothness)
    for name in ("variance", "second_moment"):
        value = getattr(constants, name)
        check_number(f"{call}({name})", name, value, at_least=0)
    for name, value in run._asdict().items():
        check_int(f"{call}({name})", name, value, 1, MAX_INT64)
    rule = "period must be at most steps"
    period, steps = run.period, run.steps
    check(period <= steps, f"{call}(period, steps)", rule, period, steps)


def check_curvature(call: str, mu: float, smoothness: float) -> None:
    """Raises unless 0 < μ ≤ L < ∞."""
    check_number(f"{call}(mu)", "mu", mu, above=0)
    check_number(f"{call}(smoothness)", "smoothness", smoothness)
    rule = "mu must be at most smoothness"
    check(mu <= smoothness, f"{call}(mu, smoothness)", rule, mu, smoothness)
