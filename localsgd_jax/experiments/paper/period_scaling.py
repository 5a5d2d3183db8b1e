"""Scaling of the period with T: H = ⌊√(T/K)⌋ keeps the error, faster growth does not.

On this problem the error increases only while HK/T is not small, so T/K is the rate
that fails for all T; √(T/K) is the rate of the theorem.

Command: localsgd reproduce period-scaling (3 minutes; 20 seconds with --quick)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from localsgd_jax.experiments import plotting
from localsgd_jax.experiments.paper import piecewise_quadratic, results
from localsgd_jax.experiments.paper.results import Finding, ResumableTable
from localsgd_jax.theory import RunParameters

NAME = "period-scaling"
TOLERANCE_FACTOR = 1.3
COLUMNS = ("growth", "steps", "period", "rounds", "error", "standard_error", "ratio")
MINI_BATCH, SQRT = "mini-batch", "sqrt(T/K)"
# Periods as functions of K and T. The first one is mini-batch SGD, the reference.
PERIODS = {
    MINI_BATCH: lambda k, t: 1,
    SQRT: lambda k, t: int((t / k) ** 0.5),
    "T^(3/4)/sqrt(K)": lambda k, t: int(t**0.75 / k**0.5),
    "T/K": lambda k, t: t // k,
}
LABELS = {
    MINI_BATCH: "H = 1 (mini-batch)",
    SQRT: "H = ⌊(T/K)$^{1/2}$⌋",
    "T^(3/4)/sqrt(K)": "H = ⌊T$^{3/4}$/K$^{1/2}$⌋",
    "T/K": "H = ⌊T/K⌋",
}


class PeriodScalingConfig(NamedTuple):
    """Grid of the experiment: every T with every growth of the period.

    Attributes:
      steps: all T.
      workers: K.
      dimension: d; each coordinate is an independent repetition.
    """

    steps: tuple[int, ...]
    workers: int = 8
    dimension: int = 512


FULL = PeriodScalingConfig((1000, 3162, 10_000, 31_623, 100_000, 316_228, 1_000_000))
QUICK = PeriodScalingConfig(FULL.steps[:5])


def run(directory: Path, config: PeriodScalingConfig) -> str:
    """Computes the missing rows, writes the figure and returns the findings as text.

    Errors as `ResumableTable`.
    """
    settings = config._asdict() | piecewise_quadratic.CONSTANTS
    rows = results.run_table(
        ResumableTable(directory, NAME, settings, COLUMNS),
        [(steps, growth) for steps in config.steps for growth in PERIODS],
        lambda: lambda key, rows: _row(config, key[0], key[1], rows),
        work=lambda key: key[0],
        unit="step",
    )
    _plot(directory, config, rows)
    return results.write_findings(directory, NAME, _findings(config, rows))


def _row(
    config: PeriodScalingConfig, steps: int, growth: str, rows: Sequence[dict]
) -> dict:
    """Returns the row of one run; earlier rows hold the mini-batch error at this T."""
    period = max(1, PERIODS[growth](config.workers, steps))
    run = RunParameters(config.workers, period, steps)
    error = piecewise_quadratic.estimate_gap(run, config.dimension)
    base = next(
        (r["error"] for r in rows if (r["steps"], r["growth"]) == (steps, MINI_BATCH)),
        error.mean,
    )
    return {
        "growth": growth,
        "steps": steps,
        "period": period,
        "rounds": -(-steps // period),
        "error": error.mean,
        "standard_error": error.standard_error,
        "ratio": error.mean / base,
    }


def _findings(config: PeriodScalingConfig, rows: Sequence[dict]) -> list[Finding]:
    """Returns for each growth whether it keeps the error, and the rounds it saves."""
    findings = []
    for growth in list(PERIODS)[1:]:
        selected = [row for row in rows if row["growth"] == growth]
        ratios = [row["ratio"] for row in selected]
        saved = [row["steps"] / row["rounds"] for row in selected]
        within = sum(ratio <= TOLERANCE_FACTOR for ratio in ratios)
        where = "at every T" if growth == SQRT else "not at every T"
        findings.append(
            Finding(
                f"K = {config.workers}, H = {growth}: error within "
                f"{TOLERANCE_FACTOR} × of mini-batch SGD {where}",
                f"within at {within} of {len(selected)} T; ratio {ratios[0]:.2f} at "
                f"T = {selected[0]['steps']} to {ratios[-1]:.2f} at "
                f"T = {selected[-1]['steps']}, {saved[0]:.0f} to {saved[-1]:.0f} times "
                "fewer rounds",
            )
        )
    return findings


def _plot(directory: Path, config: PeriodScalingConfig, rows: Sequence[dict]) -> None:
    """Plots the error relative to mini-batch SGD, and the rounds, against T."""
    figure = plotting.new_figure(8.4, 3.6)
    left, right = figure.subplots(1, 2)
    for axes, column in ((left, "ratio"), (right, "rounds")):
        curves = {
            label: _curve([r for r in rows if r["growth"] == growth], column)
            for growth, label in LABELS.items()
        }
        plotting.plot_curves(axes, curves)
        axes.set_xscale("log")
    left.axhline(TOLERANCE_FACTOR, color="0.6", linestyle=":")
    left.text(
        config.steps[0],
        TOLERANCE_FACTOR,
        f"{TOLERANCE_FACTOR} ×",
        color="0.4",
        va="bottom",
    )
    right.set_yscale("log")
    plotting.label_axes(left, "error / error of mini-batch SGD", "steps T", "ratio")
    plotting.label_axes(right, "synchronisations", "steps T", "rounds")
    right.legend(frameon=False, fontsize="small")
    condition_number = piecewise_quadratic.SMOOTHNESS / piecewise_quadratic.MU
    figure.suptitle(
        f"Growth of the period with T (κ = {condition_number:g}, K = {config.workers})"
    )
    plotting.save(figure, directory, NAME)


def _curve(rows: Sequence[dict], column: str) -> plotting.Curve:
    """Returns a column against T."""
    return [row["steps"] for row in rows], [row[column] for row in rows]
