"""Figures of the experiments and benchmarks, in one style."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullLocator

_MARKERS = "osD^vPX*"
_MIN_SUBOPTIMALITY = 1e-16
Curve = tuple[Sequence[float], Sequence[float]]


def new_figure(width: float, height: float) -> Figure:
    """Creates an empty figure without a window; sizes in inches."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save(figure: Figure, directory: Path, name: str) -> None:
    """Writes NAME.png and NAME.svg; equal figures give equal bytes.

    Raises an OSError if a file cannot be written.
    """
    figure.savefig(directory / f"{name}.png", format="png")
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(directory / f"{name}.svg", format="svg", metadata={"Date": None})


def curve_style(index: int, count: int) -> dict[str, Any]:
    """Returns the `Axes.plot` keywords for color and marker of one of several curves.

    Curves go from dark to light in their order, which is legible in grey and with
    colour blindness; the markers distinguish them a second time.
    """
    color = matplotlib.colormaps["viridis"](0.9 * index / max(count - 1, 1))
    marker = _MARKERS[index % len(_MARKERS)]
    return {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.5}


def plot_curves(axes: Axes, curves: Mapping[str, Curve], **overrides: Any) -> None:
    """Plots curves, x and y by label, in the common style with overrides."""
    for i, (label, (x, y)) in enumerate(curves.items()):
        axes.plot(x, y, label=label, **{**curve_style(i, len(curves)), **overrides})


def set_log2_scale(axes: Axes, which: str = "xy") -> None:
    """Scales axes by powers of two, with the labels 1, 2, 4, … and 1/2, 1/4, …"""
    for letter in which:
        getattr(axes, f"set_{letter}scale")("log", base=2)
        axis = getattr(axes, f"{letter}axis")
        axis.set_major_formatter(FuncFormatter(_format_power_of_two))
        axis.set_minor_locator(NullLocator())


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Adds a title, axis labels and a grid."""
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(which="major", color="0.9")
    axes.set_axisbelow(True)


def plot_convergence(
    histories: Mapping[str, Sequence[Mapping]], path: Path, title: str
) -> None:
    """Plots suboptimality against communication rounds and gradient evaluations.

    Args:
      histories: rows of a history by label. Rows without "suboptimality" are skipped;
        values below 1e-16 are drawn at 1e-16.
      path: file of the PNG.
      title: title of the figure.

    Raises:
      OSError: if the file cannot be written.
    """
    figure = new_figure(10, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    panels = {
        "round": (left, "rounds of communication"),
        "gradients": (right, "gradient evaluations, all workers"),
    }
    for column, (axes, label) in panels.items():
        for i, (name, rows) in enumerate(histories.items()):
            style = curve_style(i, len(histories)) | {"label": name}
            _plot_suboptimality(axes, rows, column, style)
        label_axes(axes, "", label, "")
    # Linear from 0 to 1, so that the initial value is shown.
    left.set_xscale("symlog", linthresh=1, linscale=0.5)
    left.set_xlim(0, None)
    right.set_xlim(0, None)
    left.set_ylabel("$f - f^*$")
    left.set_yscale("log")
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    right.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, format="png")


def _plot_suboptimality(
    axes: Axes, rows: Sequence[Mapping], column: str, style: Mapping
) -> None:
    """Plots the evaluated rows of a history, with at most nine markers."""
    rows = [row for row in rows if row.get("suboptimality") is not None]
    axes.plot(
        [row[column] for row in rows],
        [max(row["suboptimality"], _MIN_SUBOPTIMALITY) for row in rows],
        # A dotted line: there is no evaluation between two points.
        linestyle="-" if len(rows) > 2 else ":",
        markevery=sorted({round(i * (len(rows) - 1) / 8) for i in range(9)}),
        **style,
    )


def _format_power_of_two(value: float, position: int) -> str:
    """Formats a power of two as an integer or a fraction."""
    del position
    return f"{value:g}" if value >= 1 else f"1/{1 / value:g}"
