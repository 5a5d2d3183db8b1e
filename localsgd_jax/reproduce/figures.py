"""How the pictures of the experiments look: one style, PNG and SVG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

_MARKERS = "osD^vPX*"
Curve = tuple[Sequence[float], Sequence[float]]


def new(width: float, height: float) -> Figure:
    """Makes an empty figure.

    Args:
      width: in inches.
      height: in inches.

    Returns:
      A figure that belongs to no window.
    """
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save(figure: Figure, directory: Path, name: str) -> None:
    """Writes NAME.png and NAME.svg, the same bytes for the same figure.

    Args:
      figure: what to draw.
      directory: where.
      name: of the experiment.

    Raises:
      OSError: if they cannot be written.
    """
    figure.savefig(directory / f"{name}.png", format="png")
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(directory / f"{name}.svg", format="svg", metadata={"Date": None})


def style(index: int, count: int) -> dict[str, Any]:
    """Returns how one of several curves looks, dark to light in their order.

    Legible for the colour-blind and in print; the markers say it once more.

    Args:
      index: of the curve.
      count: of all.

    Returns:
      Keywords for `Axes.plot`.
    """
    shade = matplotlib.colormaps["viridis"](0.9 * index / max(count - 1, 1))
    marker = _MARKERS[index % len(_MARKERS)]
    return {"color": shade, "marker": marker, "markersize": 5, "linewidth": 1.5}


def draw(axes: Axes, curves: Mapping[str, Curve], **looks) -> None:
    """Draws curves in one style.

    Args:
      axes: where.
      curves: x and y by label.
      **looks: what is the same for all of them.
    """
    for i, (label, (x, y)) in enumerate(curves.items()):
        axes.plot(x, y, label=label, **{**style(i, len(curves)), **looks})


def powers_of_two(axes: Axes, which: str = "xy") -> None:
    """Scales axes by powers of two, labelled 1, 2, 4, …, ½ as 1/2.

    Args:
      axes: whose.
      which: "x", "y" or both.
    """
    for letter in which:
        getattr(axes, f"set_{letter}scale")("log", base=2)
        axis = getattr(axes, f"{letter}axis")
        axis.set_major_formatter(FuncFormatter(_fraction))
        axis.set_minor_locator(NullLocator())


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    """Adds title, labels and grid.

    Args:
      axes: whose.
      title: of the panel.
      x: label.
      y: label.
    """
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(which="major", color="0.9")
    axes.set_axisbelow(True)


def _fraction(value: float, position: int) -> str:
    """Writes a power of two."""
    del position
    return f"{value:g}" if value >= 1 else f"1/{1 / value:g}"
