"""Summary figure of all measurements: ratios with their targets."""

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.reporting import FigureSpec
from localsgd_jax.experiments import plotting


def plot(directory: Path, specs: Mapping[str, FigureSpec]) -> None:
    """Plots benchmarks.png from the files NAME.json that exist in the directory."""
    paths = {name: directory / f"{name}.json" for name in specs}
    points = {
        name: _labelled_ratios(path, specs[name])
        for name, path in paths.items()
        if path.exists()
    }
    if not points:
        return
    heights = [0.19 * len(rows) + 0.9 for rows in points.values()]
    figure = plotting.new_figure(7, sum(heights))
    panels = figure.subplots(len(points), 1, squeeze=False, height_ratios=heights)
    for axes, (name, rows) in zip(panels[:, 0], points.items(), strict=True):
        labels, ratios = zip(*rows, strict=True)
        positions = range(len(rows), 0, -1)
        axes.axvline(specs[name].target, color="0.6", linewidth=1)
        style = plotting.curve_style(0, 2) | {"linestyle": "none"}
        axes.plot(ratios, positions, **style)
        axes.set_yticks(positions, labels, fontsize=7)
        if max(ratios) > 4 * min(ratios):
            axes.set_xscale("log")
        plotting.label_axes(axes, name, specs[name].title, "")
    plotting.save(figure, directory, "benchmarks")


def _labelled_ratios(path: Path, spec: FigureSpec) -> list[tuple[str, float]]:
    """Returns label and ratio of each row that has a ratio."""
    rows = json.loads(path.read_text())["rows"]
    return [
        (spec.label(row), row[spec.column])
        for row in rows
        if isinstance(row[spec.column], int | float)
    ]
