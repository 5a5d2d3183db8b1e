"""What was asked for: the job, the links, and the cap on the period."""

from collections.abc import Mapping
from typing import NamedTuple

from localsgd_jax import cost, theory
from localsgd_jax.audit import inspection, targets
from localsgd_jax.base import Cluster
from localsgd_jax.plan.measure import measure

YOURS, HERE = "yours", "here"


class Settings(NamedTuple):
    """The options of the command line.

    Attributes:
      name: `module:function` to measure, or None.
      workers, compute, parameters, bits, fragments, overlap: the job.
      latency, bandwidth: of the user's link, or None.
      share: of the time that workers may wait.
      constants: μ, L, σ², G², or None.
      steps, batch: of the run.
    """

    name: str | None
    workers: int
    compute: float | None
    parameters: int | None
    bits: float | None
    fragments: int
    overlap: int
    latency: float | None
    bandwidth: float | None
    share: float
    constants: tuple[float, float, float, float] | None
    steps: int | None
    batch: int


def settle(
    settings: Settings,
) -> tuple[cost.Job, Mapping[str, cost.Link], int | None]:
    """Turns options into a job, links and the longest period allowed.

    Args:
      settings: from the command line.

    Returns:
      The job; links by name, the user's and the one measured first; the longest period
      that the statistics allow, None if nothing is known of them.

    Raises:
      ValueError: if options are missing or do not go together.
    """
    links: dict[str, cost.Link] = {}
    if (settings.latency is None) != (settings.bandwidth is None):
        raise ValueError("plan: --latency and --bandwidth go together")
    if settings.latency is not None and settings.bandwidth is not None:
        links[YOURS] = cost.Link(settings.latency, settings.bandwidth)
    if settings.name is None:
        job = _given(settings)
    else:
        job, links[HERE] = _measured(settings)
    links |= {name: link for name, link in cost.LINKS.items() if name not in links}
    slowest = max(cost.period_for_share(job, x, settings.share) for x in links.values())
    return job, links, _longest(settings, job.workers, slowest)


def _given(settings: Settings) -> cost.Job:
    """Makes the job of numbers that the user knows."""
    if settings.compute is None or settings.parameters is None:
        raise ValueError("plan: --compute and --parameters are needed, or --measure")
    return cost.Job(
        settings.workers,
        settings.compute,
        settings.parameters,
        settings.bits or 32,
        settings.fragments,
        settings.overlap,
    )


def _measured(settings: Settings) -> tuple[cost.Job, cost.Link]:
    """Makes the job of what the devices here do."""
    mesh = targets.mesh(None, {"worker": settings.workers})
    made = inspection.load(settings.name or "")(mesh)
    if not (isinstance(made, tuple) and isinstance(made[0], Cluster)):
        raise ValueError(
            f"plan: the function must return (cluster, state, batch), got {made!r}"
        )
    measured = measure(*made, mesh=mesh)
    job = measured.job._replace(fragments=settings.fragments, overlap=settings.overlap)
    changes = {
        key: getattr(settings, key)
        for key in ("compute", "parameters", "bits")
        if getattr(settings, key) is not None
    }
    return job._replace(**changes), measured.link


def _longest(settings: Settings, workers: int, period: int) -> int | None:
    """Returns the period up to which the theory promises linear speedup."""
    if (settings.constants is None) != (settings.steps is None):
        raise ValueError("plan: --constants and --steps go together")
    if settings.constants is None or settings.steps is None:
        return None
    constants = theory.Constants(*settings.constants)
    run = theory.Run(workers, 1, settings.steps, settings.batch)
    a = theory.shift(constants.mu, constants.smoothness, period)
    return theory.longest_period(constants, run, a)
