"""What was asked for: the job, the links, and the cap on the period."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from localsgd_jax import cost, theory
from localsgd_jax.audit import inspection, targets
from localsgd_jax.base import Cluster, PyTree, State
from localsgd_jax.plan.cap import Cap, cap, measure_constants
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
      mu: μ alone, for constants that are measured, or None.
      steps: of the run, or None.
      batch: of a worker, or None for that which is measured.
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
    mu: float | None
    steps: int | None
    batch: int | None


class Made(NamedTuple):
    """What the user's function returns for a mesh.

    Attributes:
      cluster, state, batch: as for `cluster.step`.
      loss: of a single example, None if there is to be no cap.
      examples: leaves with a leading axis n, None for those of the batch.
    """

    cluster: Cluster
    state: State
    batch: PyTree
    loss: Callable | None = None
    examples: PyTree = None


class Settled(NamedTuple):
    """What is to be planned.

    Attributes:
      job: what is trained.
      links: by name, the user's and the one measured first.
      cap: what the theory says of the period, None if it was not asked.
    """

    job: cost.Job
    links: Mapping[str, cost.Link]
    cap: Cap | None


def settle(settings: Settings) -> Settled:
    """Turns options into a job, links and the longest period allowed.

    Args:
      settings: from the command line.

    Returns:
      What is to be planned.

    Raises:
      ValueError: if options are missing or do not go together.
    """
    _check(settings)
    links: dict[str, cost.Link] = {}
    if settings.latency is not None and settings.bandwidth is not None:
        links[YOURS] = cost.Link(settings.latency, settings.bandwidth)
    if settings.name is None:
        made, job = None, _given(settings)
    else:
        mesh = targets.mesh(None, {"worker": settings.workers})
        made = _made(settings.name, mesh)
        job, links[HERE] = _measured(settings, made, mesh)
    links |= {name: link for name, link in cost.LINKS.items() if name not in links}
    return Settled(job, links, _cap(settings, made))


def _check(settings: Settings) -> None:
    """Refuses options that do not go together, before anything is measured."""
    if (settings.latency is None) != (settings.bandwidth is None):
        raise ValueError("plan: --latency and --bandwidth go together")
    if settings.steps is None and (settings.constants or settings.mu):
        raise ValueError("plan: --constants and --mu need --steps")
    if settings.mu and (settings.constants or not settings.name):
        raise ValueError("plan: --mu goes with --measure, and not with --constants")
    if settings.steps and not (settings.constants or settings.name):
        raise ValueError("plan: --steps needs --constants, or --measure")


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


def _made(name: str, mesh: Mesh) -> Made:
    """Calls the user's function."""
    made = inspection.load(name)(mesh)
    if not (
        isinstance(made, tuple) and 3 <= len(made) <= 5 and isinstance(made[0], Cluster)
    ):
        raise ValueError(
            f"plan: the function must return (cluster, state, batch), and may add the "
            f"loss of an example, and examples; got {made!r}"
        )
    return Made(*made)


def _measured(settings: Settings, made: Made, mesh: Mesh) -> tuple[cost.Job, cost.Link]:
    """Makes the job of what the devices here do."""
    measured = measure(made.cluster, made.state, made.batch, mesh)
    job = measured.job._replace(fragments=settings.fragments, overlap=settings.overlap)
    changes = {
        key: getattr(settings, key)
        for key in ("compute", "parameters", "bits")
        if getattr(settings, key) is not None
    }
    return job._replace(**changes), measured.link


def _cap(settings: Settings, made: Made | None) -> Cap | None:
    """Asks the theory, if the length of the run is known."""
    if settings.steps is None:
        return None
    workers, batch = settings.workers, settings.batch or 1
    if made is not None:
        workers = made.cluster.workers
        rows = jax.tree.leaves(made.batch)[0].shape[1:2]
        batch = settings.batch or (rows[0] if rows else 1)
    run = theory.Run(workers, 1, settings.steps, batch)
    if settings.constants is not None:
        return cap(theory.Constants(*settings.constants), False, run)
    if made is None or made.loss is None:
        raise ValueError(
            "plan: --steps needs --constants, or a function that returns (cluster, "
            "state, batch, loss)"
        )
    constants = measure_constants(
        made.cluster, made.state, made.batch, made.loss, made.examples, settings.mu
    )
    return cap(constants, True, run)
