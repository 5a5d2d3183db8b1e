"""What the theorems know of a problem and of a run, and what they refuse."""

from typing import NamedTuple


class Constants(NamedTuple):
    """What the bounds know of a problem; σ² and G² hold all along the run.

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


class Run(NamedTuple):
    """What the bounds know of a run.

    Attributes:
      workers: K.
      period: H, the most steps between two synchronisations.
      steps: T, of every worker.
      batch: b, samples per worker and step.
    """

    workers: int
    period: int
    steps: int
    batch: int = 1


class Terms(NamedTuple):
    """The three terms of a bound, which is their `sum`.

    Attributes:
      start: what is left of the distance from x₀ to x*.
      noise: what sampling costs; more workers make it smaller.
      drift: what it costs that workers stray between synchronisations.
    """

    start: float
    noise: float
    drift: float


def check(name, constants, run):
    """Refuses impossible constants of a problem or a run."""
    mu, smoothness, variance, second_moment = constants
    check_curvature(name, mu, smoothness)
    at_least(name, 0, variance=variance, second_moment=second_moment)
    at_least(name, 1, **run._asdict())
    call, rule = f"{name}(period, steps)", "period must be at most steps"
    require(run.period <= run.steps, call, rule, run.period, run.steps)


def check_curvature(name, mu, smoothness):
    """Refuses anything but 0 < μ ≤ L."""
    require(mu > 0, f"{name}(mu)", "mu must be positive", mu)
    call, rule = f"{name}(mu, smoothness)", "mu must be at most smoothness"
    require(mu <= smoothness, call, rule, mu, smoothness)


def at_least(name, least, **values):
    """Refuses smaller values."""
    for key, value in values.items():
        require(
            value >= least, f"{name}({key})", f"{key} must be at least {least}", value
        )


def require(holds, call, rule, *values):
    """Raises with the call, the rule and the values, unless the rule holds."""
    if not holds:
        raise ValueError(f"{call}: {rule}, got {' and '.join(map(str, values))}")
