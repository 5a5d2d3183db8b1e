"""The figure of the w8a experiment: speedup against K."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from localsgd_jax.reproduce import figures


def draw(directory: Path, speeds: Sequence[dict]) -> None:
    """Draws a column of panels for each price ρ and a row for each b.

    Args:
      directory: where.
      speeds: from `w8a_report.speedups`; curves are drawn for the largest ε.

    Raises:
      OSError: if the figure cannot be written.
    """
    rhos, batches = _distinct(speeds, "rho"), _distinct(speeds, "batch")
    figure = figures.new(3.3 * len(rhos) + 1, 2.4 * len(batches) + 0.4)
    panels = figure.subplots(
        len(batches), len(rhos), sharex=True, sharey="col", squeeze=False
    )
    for line, batch in zip(panels, batches, strict=True):
        for axes, rho in zip(line, rhos, strict=True):
            here = [r for r in speeds if (r["rho"], r["batch"]) == (rho, batch)]
            _panel(axes, here)
            price = f"ρ = {rho:g}" if rho else "communication free"
            figures.finish(axes, f"b = {batch}, {price}", "workers K", "speedup")
            axes.label_outer(remove_inner_ticks=False)
            axes.tick_params(labelleft=True)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center")
    largest = max(_distinct(speeds, "epsilon"))
    figure.suptitle(f"w8a: speedup to f − f* = {largest:g}")
    figures.save(figure, directory, "w8a")


def _panel(axes: Axes, rows: Sequence[dict]) -> None:
    """Draws a curve for each H at the largest ε, hollow markers for smaller ones."""
    workers, periods = _distinct(rows, "workers"), _distinct(rows, "period")
    level = [k if rows[0]["rho"] == 0 else 1 for k in workers]
    axes.plot(workers, level, color="0.6", linestyle=":")
    largest, *smaller = sorted(_distinct(rows, "epsilon"), reverse=True)
    for i, period in enumerate(periods):
        style = figures.style(i, len(periods))
        axes.plot(*_curve(rows, largest, period), label=f"H = {period}", **style)
        for epsilon in smaller:
            hollow: dict[str, Any] = {**style, "mfc": "white", "linestyle": "none"}
            axes.plot(*_curve(rows, epsilon, period), **hollow)
    for epsilon in smaller:
        axes.plot([], [], "o", color="0.4", mfc="white", label=f"ε = {epsilon:g}")
    figures.powers_of_two(axes)


def _curve(rows: Sequence[dict], epsilon: float, period: int) -> figures.Curve:
    """Returns K and S(K)."""
    mine = [r for r in rows if (r["epsilon"], r["period"]) == (epsilon, period)]
    return [r["workers"] for r in mine], [r["speedup"] for r in mine]


def _distinct(rows: Sequence[dict], name: str) -> list:
    """Returns the different values of a column, in order of appearance."""
    return list(dict.fromkeys(row[name] for row in rows))
