"""One picture of all measurements: every ratio beside its aim."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

from localsgd_jax.reproduce import figures


def draw(directory: Path, names: Sequence[str]) -> None:
    """Draws benchmarks.png from what NAME.json in the directory says.

    A measurement's `SHOWN` names the column that is drawn, those that label a bar, and
    the aim.
    """
    found = [name for name in names if (directory / f"{name}.json").exists()]
    tables = {name: _bars(directory / f"{name}.json", name) for name in found}
    heights = [0.19 * len(bars) + 0.9 for bars in tables.values()]
    figure = figures.new(7, sum(heights))
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)
    for axes, (name, bars) in zip(panels[:, 0], tables.items(), strict=True):
        shown = importlib.import_module(f"benchmarks.{name}").SHOWN
        labels, ratios = zip(*bars, strict=True)
        places = range(len(bars), 0, -1)
        axes.axvline(shown.aim, color="0.6", linewidth=1)
        axes.plot(ratios, places, **figures.style(0, 2) | {"linestyle": "none"})
        axes.set_yticks(places, labels, fontsize=7)
        if max(ratios) > 4 * min(ratios):
            axes.set_xscale("log")
        figures.finish(axes, name, shown.says, "")
    figures.save(figure, directory, "benchmarks")


def _bars(path: Path, name: str) -> list[tuple[str, float]]:
    """Returns labels and ratios of those rows that have one."""
    shown = importlib.import_module(f"benchmarks.{name}").SHOWN
    rows = json.loads(path.read_text())["rows"]
    return [
        (shown.label(row), row[shown.column])
        for row in rows
        if isinstance(row[shown.column], int | float)
    ]
