"""Sweep over the period H on handwritten digits (`localsgd quickstart`)."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import localsgd_jax as lsgd
from localsgd_jax.experiments import choices, datasets, devices, logistic, plotting
from localsgd_jax.experiments.run import Problem, RunConfig, run
from localsgd_jax.reporting import Run, columns_of, write_report

WORKERS, BATCH, SEED = 8, 4, 0
PERIODS = (1, 4, 16, 64, None)
NEXT = (
    "next: localsgd train --data FILE       train on a LIBSVM file",
    "      localsgd report RUN [RUN ...]    compare runs in a browser",
    "      your own loop: https://github.com/localsgd-jax/localsgd-jax/blob/main/docs/"
    "getting_started.md",
)


class Outcome(NamedTuple):
    """Result of one period.

    Attributes:
      period: H, or None for one-shot averaging.
      rounds: number of communication rounds.
      megabytes: megabytes sent by each worker.
      suboptimality: final f − f*.
      seconds: wall time, including compilation.
    """

    period: int | None
    rounds: int
    megabytes: float
    suboptimality: float
    seconds: float


def check_writable(option: str, path: Path) -> None:
    """Raises an OSError if the path is a directory or its parent does not exist."""
    if not path.parent.is_dir():
        raise NotADirectoryError(f"{option}: no directory {str(path.parent)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{option}: {str(path)!r} is a directory")


def sweep(figure: Path, page: Path, steps: int, on_step: Callable) -> dict:
    """Trains with every period at an equal number of gradient evaluations.

    Args:
      figure: path of the PNG to write.
      page: path of the report to write.
      steps: T, local steps of each worker.
      on_step: called without arguments for each step that is loaded.

    Returns:
      The output of `--json`: the setup, and a dict per period under "runs".

    Raises:
      OSError: if the figure or the report cannot be written.
    """
    start = time.perf_counter()
    dataset = datasets.digits()
    problem = Problem(dataset, logistic.optimal_value(dataset))
    mesh = devices.make_local_mesh(WORKERS)
    rate = choices.peak_learning_rate("sgd", logistic.batch_curvature(dataset, BATCH))
    optimizer = choices.OPTIMIZERS["sgd"](choices.linear_decay(rate, steps))
    config = RunConfig(mesh, WORKERS, lsgd.never(), optimizer, BATCH, steps, SEED)
    outcomes, histories = [], {}
    for period in PERIODS:
        schedule = lsgd.every(period) if period else lsgd.never()
        outcome, rows = _timed_run(
            problem, config._replace(schedule=schedule), period, on_step
        )
        outcomes.append(outcome._asdict())
        histories[f"H = {period}" if period else "one-shot"] = rows
    plotting.plot_convergence(
        histories, figure, f"Local SGD on {dataset.name}, K = {WORKERS}"
    )
    setup = _metadata(problem, config) | {"learning_rate": rate}
    write_report(_recorded_runs(histories, setup), page)
    return setup | {
        "runs": outcomes,
        "figure": str(figure),
        "report": str(page),
        "seconds": time.perf_counter() - start,
    }


def format_table(result: dict) -> str:
    """Formats the result of `sweep` as a text table."""
    lines = [
        f"l2-regularised logistic regression on {result['data']}: "
        f"{result['examples']} examples, {result['features']} features",
        f"{result['workers']} workers on {result['devices']} {result['platform']} "
        f"devices, {result['steps']} steps with batches of {result['batch']}: "
        f"{result['gradients']} gradient evaluations in every run",
        "",
        f"{'period':>8}{'rounds':>9}{'MB sent/worker':>17}{'f - f*':>12}"
        f"{'seconds':>10}",
    ]
    for row in (Outcome(**fields) for fields in result["runs"]):
        lines.append(
            f"{row.period or 'one-shot':>8}{row.rounds:>9}{row.megabytes:>17.4f}"
            f"{row.suboptimality:>12.2e}{row.seconds:>10.1f}"
        )
    lines += [
        "",
        f"figure: {result['figure']}, report: {result['report']} "
        f"(total {result['seconds']:.0f} s)",
        "",
        *NEXT,
    ]
    return "\n".join(lines)


def _recorded_runs(histories: Mapping[str, list[dict]], setup: Mapping) -> list[Run]:
    """Returns the runs of a report, each with its period in the configuration."""
    runs = []
    for (name, rows), period in zip(histories.items(), PERIODS, strict=True):
        config = {"period": period or "one-shot", **setup}
        runs.append(Run(name, config, columns_of(rows)))
    return runs


def _metadata(problem: Problem, config: RunConfig) -> dict:
    """Returns the setup that all runs have in common."""
    return {
        "data": problem.dataset.name,
        "examples": problem.dataset.examples,
        "features": problem.dataset.dimension,
        "f_star": problem.minimum,
        "workers": config.workers,
        "devices": config.mesh.size,
        "platform": config.mesh.devices.flat[0].platform,
        "batch": config.batch,
        "steps": config.steps,
        "gradients": config.steps * config.workers * config.batch,
    }


def _timed_run(
    problem: Problem, config: RunConfig, period: int | None, on_step: Callable
) -> tuple[Outcome, list[dict]]:
    """Runs once; returns the outcome and the rows of the history."""
    rows, start = [], time.perf_counter()
    run(problem, config, rows.append, on_step)
    seconds, last = time.perf_counter() - start, rows[-1]
    megabytes = last["bytes"] / 1e6
    outcome = Outcome(period, last["round"], megabytes, last["suboptimality"], seconds)
    return outcome, rows
