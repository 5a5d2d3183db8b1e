"""Figure of the w8a experiment: speedup against K."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from localsgd_jax.experiments import plotting


def plot_speedups(directory: Path, speedups: Sequence[dict]) -> None:
    """Plots a column of panels per communication cost ρ and a row per b.

    Curves are drawn for the largest ε of the rows of `w8a_report.speedups`.
    """
    rhos, batches = _distinct(speedups, "rho"), _distinct(speedups, "batch")
    figure = plotting.new_figure(3.3 * len(rhos) + 1, 2.4 * len(batches) + 0.4)
    panels = figure.subplots(
        len(batches), len(rhos), sharex=True, sharey="col", squeeze=False
    )
    for axes_row, batch in zip(panels, batches, strict=True):
        for axes, rho in zip(axes_row, rhos, strict=True):
            selected = [r for r in speedups if (r["rho"], r["batch"]) == (rho, batch)]
            _plot_panel(axes, selected)
            cost = f"ρ = {rho:g}" if rho else "free communication"
            plotting.label_axes(axes, f"b = {batch}, {cost}", "workers K", "speedup")
            axes.label_outer(remove_inner_ticks=False)
            axes.tick_params(labelleft=True)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center")
    largest = max(_distinct(speedups, "epsilon"))
    figure.suptitle(f"w8a: speedup to f − f* = {largest:g}")
    plotting.save(figure, directory, "w8a")


def _plot_panel(axes: Axes, rows: Sequence[dict]) -> None:
    """Plots a curve per H for the largest ε, and open markers for smaller ones."""
    workers, periods = _distinct(rows, "workers"), _distinct(rows, "period")
    reference = [k if rows[0]["rho"] == 0 else 1 for k in workers]
    axes.plot(workers, reference, color="0.6", linestyle=":")
    largest, *smaller = sorted(_distinct(rows, "epsilon"), reverse=True)
    for i, period in enumerate(periods):
        style = plotting.curve_style(i, len(periods))
        axes.plot(*_curve(rows, largest, period), label=f"H = {period}", **style)
        for epsilon in smaller:
            open_markers: dict[str, Any] = {
                **style,
                "mfc": "white",
                "linestyle": "none",
            }
            axes.plot(*_curve(rows, epsilon, period), **open_markers)
    for epsilon in smaller:
        axes.plot([], [], "o", color="0.4", mfc="white", label=f"ε = {epsilon:g}")
    plotting.set_log2_scale(axes)


def _curve(rows: Sequence[dict], epsilon: float, period: int) -> plotting.Curve:
    """Returns K and S(K)."""
    selected = [r for r in rows if (r["epsilon"], r["period"]) == (epsilon, period)]
    return [r["workers"] for r in selected], [r["speedup"] for r in selected]


def _distinct(rows: Sequence[dict], name: str) -> list:
    """Returns the distinct values of a column, in order of appearance."""
    return list(dict.fromkeys(row[name] for row in rows))
