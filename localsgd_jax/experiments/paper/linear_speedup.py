"""Linear speedup: error × K against K, and the K at which it ends.

The theory allows K ≤ T/(bH²), with a bound of the drift by the second moment of the
gradients. The bound is conservative: the drift is noise here, which larger batches also
reduce.

Command: localsgd reproduce linear-speedup (1 minute; 10 seconds with --quick)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes

from localsgd_jax.experiments import plotting
from localsgd_jax.experiments.paper import piecewise_quadratic, results
from localsgd_jax.experiments.paper.results import Finding, ResumableTable
from localsgd_jax.theory import RunParameters

NAME = "linear-speedup"
TOLERANCE_FACTOR = 1.3
COLUMNS = ("batch", "workers", "error", "standard_error", "scaled_error")


class LinearSpeedupConfig(NamedTuple):
    """Grid of the experiment: every b with every K, at one T and H.

    Attributes:
      dimension: d; each coordinate is an independent repetition.
      steps: T.
      period: H.
      workers: all K, from the smallest.
      batches: all b.
    """

    dimension: int = 4096
    steps: int = 4096
    period: int = 14
    workers: tuple[int, ...] = tuple(2**i for i in range(7))
    batches: tuple[int, ...] = (1, 4, 16)


FULL = LinearSpeedupConfig()
QUICK = FULL._replace(dimension=1024)


def run(directory: Path, config: LinearSpeedupConfig) -> str:
    """Computes the missing rows, writes the figure and returns the findings as text.

    Errors as `ResumableTable`.
    """
    settings = config._asdict() | piecewise_quadratic.CONSTANTS
    rows = results.run_table(
        ResumableTable(directory, NAME, settings, COLUMNS),
        [(batch, workers) for batch in config.batches for workers in config.workers],
        lambda: lambda key, rows: _row(config, *key),
        work=lambda key: key[1],
        unit="worker",
    )
    _plot(directory, config, rows)
    return results.write_findings(directory, NAME, _findings(config, rows))


def theoretical_max_workers(config: LinearSpeedupConfig, batch: int) -> float:
    """Returns the largest K with linear speedup in theory, up to a constant.

        H ≤ √(T/(Kb))   ⇔   K ≤ T/(bH²)

    Args:
      config: T and H.
      batch: b.

    Returns:
      T/(bH²).

    Example:
      >>> config = LinearSpeedupConfig(steps=4096, period=16)
      >>> theoretical_max_workers(config, batch=4)
      4.0
    """
    return config.steps / (batch * config.period**2)


def _row(config: LinearSpeedupConfig, batch: int, workers: int) -> dict:
    """Returns the row of one run."""
    run = RunParameters(workers, config.period, config.steps, batch)
    error = piecewise_quadratic.estimate_gap(run, config.dimension)
    # σ² = 1 per coordinate: with a linear speedup this is constant in K and b.
    scale = workers * batch * piecewise_quadratic.MU * config.steps
    return {
        "batch": batch,
        "workers": workers,
        "error": error.mean,
        "standard_error": error.standard_error,
        "scaled_error": error.mean * scale,
    }


def _relative_errors(rows: Sequence[dict], batch: int) -> dict[int, float]:
    """Returns error × K by K, as a multiple of its value at the smallest K."""
    scaled = {r["workers"]: r["scaled_error"] for r in rows if r["batch"] == batch}
    return {workers: value / scaled[min(scaled)] for workers, value in scaled.items()}


def _findings(config: LinearSpeedupConfig, rows: Sequence[dict]) -> list[Finding]:
    """Returns for each b the largest K up to which error × K is constant."""
    findings = []
    for batch in config.batches:
        relative = _relative_errors(rows, batch)
        above = [k for k, ratio in relative.items() if ratio > TOLERANCE_FACTOR]
        constant = [k for k in relative if not above or k < min(above)]
        end = (
            f"{relative[min(above)]:.2f} × at K = {min(above)}"
            if above
            else "within the tolerance at every K"
        )
        limit = theoretical_max_workers(config, batch)
        findings.append(
            Finding(
                f"b = {batch}: error × K constant within {TOLERANCE_FACTOR} × up to "
                f"the order of K = T/(bH²) = {limit:.3g}",
                f"constant up to K = {max(constant)}; {end}",
            )
        )
    return findings


def _plot(directory: Path, config: LinearSpeedupConfig, rows: Sequence[dict]) -> None:
    """Plots error × K against K, one panel per b, with the limit of the theory."""
    figure = plotting.new_figure(9, 3.4)
    panels = figure.subplots(1, len(config.batches), sharey=True, squeeze=False)[0]
    for axes, batch in zip(panels, config.batches, strict=True):
        limit = theoretical_max_workers(config, batch)
        _plot_panel(axes, _relative_errors(rows, batch), limit)
        plotting.label_axes(
            axes, f"b = {batch}", "workers K", "error × K / value at K = 1"
        )
        axes.label_outer()
    panels[0].legend(frameon=False, fontsize="small", loc="lower right")
    figure.suptitle(f"Linear speedup at T = {config.steps}, H = {config.period}")
    plotting.save(figure, directory, NAME)


def _plot_panel(axes: Axes, relative: dict[int, float], limit: float) -> None:
    """Plots the curve of one b."""
    axes.axvspan(1, limit, color="0.93")
    axes.axvline(limit, color="tab:orange", linestyle="--", label="K = T/(bH²)")
    axes.axhline(
        TOLERANCE_FACTOR, color="0.6", linestyle=":", label=f"{TOLERANCE_FACTOR} ×"
    )
    plotting.plot_curves(axes, {"measured": (list(relative), list(relative.values()))})
    plotting.set_log2_scale(axes, "x")
    axes.set_ylim(bottom=0)
