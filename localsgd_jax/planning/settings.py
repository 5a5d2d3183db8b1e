"""Resolution of command-line options into workload, links and period bound."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from localsgd_jax import theory
from localsgd_jax.analysis import compile_targets, entry_point
from localsgd_jax.core.types import Cluster, PyTree, State
from localsgd_jax.planning import cost_model
from localsgd_jax.planning.measurement import measure
from localsgd_jax.planning.period_bound import (
    PeriodBound,
    measure_constants,
    theoretical_period_bound,
)

USER_LINK, MEASURED_LINK = "yours", "measured"


class Settings(NamedTuple):
    """Options of the command line.

    Attributes:
      function_name: `module:function` to measure, or None.
      workers, step_seconds, parameters, bits, fragments, overlap_steps: fields of
        `cost_model.Workload`, or None for measured or default values.
      latency, bandwidth: link of the user, or None.
      max_communication_fraction: largest fraction of the time in exposed communication.
      constants: μ, L, σ², G², or None.
      mu: μ alone, if the other constants are measured, or None.
      steps: local steps of the run, or None.
      batch: examples per worker and step; None for the size of the measured batch.
    """

    function_name: str | None
    workers: int
    step_seconds: float | None
    parameters: int | None
    bits: float | None
    fragments: int
    overlap_steps: int
    latency: float | None
    bandwidth: float | None
    max_communication_fraction: float
    constants: tuple[float, float, float, float] | None
    mu: float | None
    steps: int | None
    batch: int | None


class UserProgram(NamedTuple):
    """Result of the user's function for a mesh.

    Attributes:
      cluster, state, batch: as for `cluster.step`.
      loss: loss of a single example; None if no period bound is wanted.
      examples: leaves with a leading axis n; None for the examples of the batch.
    """

    cluster: Cluster
    state: State
    batch: PyTree
    loss: Callable | None = None
    examples: PyTree = None


class PlanInput(NamedTuple):
    """Input of the planner.

    Attributes:
      workload: the workload.
      links: links by name, first the link of the user and the measured one.
      bound: theoretical bound on the period; None without the length of the run.
    """

    workload: cost_model.Workload
    links: Mapping[str, cost_model.Link]
    bound: PeriodBound | None


def resolve(settings: Settings) -> PlanInput:
    """Resolves options into a workload, links and a period bound.

    Args:
      settings: options of the command line.

    Returns:
      The input of the planner.

    Raises:
      ValueError: if options are missing or exclude each other.
    """
    _check(settings)
    links: dict[str, cost_model.Link] = {}
    if settings.latency is not None and settings.bandwidth is not None:
        links[USER_LINK] = cost_model.Link(settings.latency, settings.bandwidth)
    if settings.function_name is None:
        program, workload = None, _workload_from_options(settings)
    else:
        mesh = compile_targets.target_mesh(None, {"worker": settings.workers})
        program = _build(settings.function_name, mesh)
        workload, links[MEASURED_LINK] = _measured_workload(settings, program, mesh)
    typical = cost_model.LINKS.items()
    links |= {name: link for name, link in typical if name not in links}
    return PlanInput(workload, links, _period_bound(settings, program))


def _check(settings: Settings) -> None:
    """Raises if options exclude each other, before anything is measured."""
    if (settings.latency is None) != (settings.bandwidth is None):
        raise ValueError("plan: --latency and --bandwidth must be given together")
    if settings.steps is None and (settings.constants or settings.mu):
        raise ValueError("plan: --constants and --mu need --steps")
    if settings.mu and (settings.constants or not settings.function_name):
        raise ValueError("plan: --mu needs --measure and excludes --constants")
    if settings.steps and not (settings.constants or settings.function_name):
        raise ValueError("plan: --steps needs --constants or --measure")


def _workload_from_options(settings: Settings) -> cost_model.Workload:
    """Returns the workload of the options."""
    if settings.step_seconds is None or settings.parameters is None:
        raise ValueError(
            "plan: --step-seconds and --parameters are needed, or --measure"
        )
    return cost_model.Workload(
        settings.workers,
        settings.step_seconds,
        settings.parameters,
        settings.bits or 32,
        settings.fragments,
        settings.overlap_steps,
    )


def _build(name: str, mesh: Mesh) -> UserProgram:
    """Calls the user's function."""
    program = entry_point.import_function(name)(mesh)
    if not (
        isinstance(program, tuple)
        and 3 <= len(program) <= 5
        and isinstance(program[0], Cluster)
    ):
        raise ValueError(
            "plan: the function must return (cluster, state, batch), optionally with "
            "the loss of an example and with examples, got "
            f"{entry_point.describe_result(program)}"
        )
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(program[1:3])):
        raise ValueError(
            "plan: the state and the batch are measured and must be arrays, got "
            "jax.ShapeDtypeStruct"
        )
    return UserProgram(*program)


def _measured_workload(
    settings: Settings, program: UserProgram, mesh: Mesh
) -> tuple[cost_model.Workload, cost_model.Link]:
    """Measures the workload and the link; given options replace measured values."""
    measured = measure(program.cluster, program.state, program.batch, mesh)
    options = {
        name: getattr(settings, name)
        for name in ("step_seconds", "parameters", "bits", "fragments", "overlap_steps")
    }
    overrides = {name: value for name, value in options.items() if value is not None}
    return measured.workload._replace(**overrides), measured.link


def _period_bound(
    settings: Settings, program: UserProgram | None
) -> PeriodBound | None:
    """Returns the theoretical bound; None if the length of the run is unknown."""
    if settings.steps is None:
        return None
    workers, batch = settings.workers, settings.batch or 1
    if program is not None:
        workers = program.cluster.num_workers
        rows = jax.tree.leaves(program.batch)[0].shape[1:2]
        batch = settings.batch or (rows[0] if rows else 1)
    run = theory.RunParameters(workers, 1, settings.steps, batch)
    if settings.constants is not None:
        constants = theory.Constants(*settings.constants)
        return theoretical_period_bound(constants, False, run)
    if program is None or program.loss is None:
        raise ValueError(
            "plan: --steps needs --constants, or a function that returns (cluster, "
            "state, batch, loss)"
        )
    constants = measure_constants(
        program.cluster,
        program.state,
        program.batch,
        program.loss,
        program.examples,
        settings.mu,
    )
    return theoretical_period_bound(constants, True, run)
