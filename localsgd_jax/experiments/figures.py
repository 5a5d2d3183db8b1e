"""Pictures of f − f*: against rounds of communication and gradient evaluations."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

_FLOOR = 1e-16
_MARKERS = "osD^vPX*"


def convergence(
    curves: Mapping[str, Sequence[Mapping]], path: Path, title: str
) -> None:
    """Draws f − f* of some runs, once for what they send and once for what they do.

    Args:
      curves: for each label the rows of a history; those without "suboptimality" are
        left out, what is below 1e-16 is drawn there.
      path: of the PNG.
      title: over both panels.

    Raises:
      OSError: if the file cannot be written.
    """
    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    # Dark to light in the order of the curves, legible for the colour-blind and in
    # print; the markers say it once more.
    shades = matplotlib.colormaps["viridis"].resampled(256)
    for i, (label, rows) in enumerate(curves.items()):
        style = {
            "label": label,
            "color": shades(0.87 * i / max(len(curves) - 1, 1)),
            "marker": _MARKERS[i % len(_MARKERS)],
        }
        _draw(left, rows, "round", style)
        _draw(right, rows, "gradients", style)
    # Linear from 0 to 1, so that the start is seen too.
    left.set_xscale("symlog", linthresh=1, linscale=0.5)
    left.set(xlabel="rounds of communication", ylabel="$f - f^*$", xlim=(0, None))
    right.set(xlabel="gradient evaluations, all workers", xlim=(0, None))
    left.set_yscale("log")
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (left, right):
        axes.grid(which="major", color="0.9")
        axes.set_axisbelow(True)
    right.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, format="png")


def _draw(axes: Axes, rows: Sequence[Mapping], name: str, style: Mapping) -> None:
    """Draws one curve, with about eight markers."""
    seen = [row for row in rows if row.get("suboptimality") is not None]
    axes.plot(
        [row[name] for row in seen],
        [max(row["suboptimality"], _FLOOR) for row in seen],
        # Between two points nothing is known.
        linestyle="-" if len(seen) > 2 else ":",
        markevery=sorted({round(i * (len(seen) - 1) / 8) for i in range(9)}),
        markersize=5,
        linewidth=1.5,
        **style,
    )
