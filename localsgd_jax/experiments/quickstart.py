"""The trade-off of Local SGD in a minute: fewer rounds against a larger f − f*."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import localsgd_jax as lsgd
from localsgd_jax.experiments import choices, datasets, devices, figures, logistic
from localsgd_jax.experiments.run import Plan, Problem, run

WORKERS, BATCH, SEED = 8, 4, 0
PERIODS = (1, 4, 16, 64, None)


class Outcome(NamedTuple):
    """What one period led to.

    Attributes:
      period: H, or None for one-shot averaging.
      rounds: of communication.
      megabytes: sent by each worker.
      suboptimality: f − f* in the end.
      seconds: wall time, compilation included.
    """

    period: int | None
    rounds: int
    megabytes: float
    suboptimality: float
    seconds: float


def check_place(figure: Path) -> None:
    """Refuses a path to which no file can be written.

    Args:
      figure: of the PNG.

    Raises:
      OSError: if its directory is missing, or it is a directory itself.
    """
    if not figure.parent.is_dir():
        raise NotADirectoryError(f"--figure: no directory {str(figure.parent)!r}")
    if figure.is_dir():
        raise IsADirectoryError(f"--figure: {str(figure)!r} is a directory")


def sweep(figure: Path, steps: int, advance: Callable) -> dict:
    """Trains with every period at an equal number of gradient evaluations.

    Args:
      figure: where the PNG goes.
      steps: T, local steps of each worker.
      advance: called without arguments for each step that is loaded.

    Returns:
      What `--json` prints; the outcomes are under "runs".

    Raises:
      OSError: if the picture cannot be written.
    """
    start = time.perf_counter()
    dataset = datasets.digits()
    problem = Problem(dataset, logistic.minimum(dataset))
    mesh = devices.worker_mesh(WORKERS)
    rate = choices.peak_learning_rate("sgd", logistic.batch_curvature(dataset, BATCH))
    optimizer = choices.OPTIMIZERS["sgd"](choices.decay(rate, steps))
    outcomes, curves = [], {}
    for period in PERIODS:
        schedule = lsgd.every(period) if period else lsgd.never()
        plan = Plan(mesh, WORKERS, schedule, optimizer, BATCH, steps, SEED)
        outcome, rows = _timed(problem, plan, period, advance)
        outcomes.append(outcome._asdict())
        curves[f"H = {period}" if period else "one-shot"] = rows
    figures.convergence(curves, figure, f"Local SGD on {dataset.name}, K = {WORKERS}")
    return _described(problem, plan) | {
        "learning_rate": rate,
        "runs": outcomes,
        "figure": str(figure),
        "seconds": time.perf_counter() - start,
    }


def table(result: dict) -> str:
    """Lays out the result of `sweep` for people.

    Args:
      result: from `sweep`.

    Returns:
      A few lines.
    """
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
    for row in map(lambda run: Outcome(**run), result["runs"]):
        lines.append(
            f"{row.period or 'one-shot':>8}{row.rounds:>9}{row.megabytes:>17.4f}"
            f"{row.suboptimality:>12.2e}{row.seconds:>10.1f}"
        )
    lines += ["", f"picture: {result['figure']} ({result['seconds']:.0f} s in all)"]
    return "\n".join(lines)


def _described(problem: Problem, plan: Plan) -> dict:
    """Returns what all runs have in common."""
    return {
        "data": problem.dataset.name,
        "examples": problem.dataset.examples,
        "features": problem.dataset.dimension,
        "f_star": problem.minimum,
        "workers": plan.workers,
        "devices": plan.mesh.size,
        "platform": plan.mesh.devices.flat[0].platform,
        "batch": plan.batch,
        "steps": plan.steps,
        "gradients": plan.steps * plan.workers * plan.batch,
    }


def _timed(
    problem: Problem, plan: Plan, period: int | None, advance: Callable
) -> tuple[Outcome, list[dict]]:
    """Runs once; returns the outcome and the rows of the history."""
    rows, start = [], time.perf_counter()
    run(problem, plan, rows.append, advance)
    seconds, last = time.perf_counter() - start, rows[-1]
    megabytes = last["bytes"] / 1e6
    outcome = Outcome(period, last["round"], megabytes, last["suboptimality"], seconds)
    return outcome, rows
