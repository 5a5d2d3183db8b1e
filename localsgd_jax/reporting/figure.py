"""Interactive figure of runs, made with Plotly."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from localsgd_jax.reporting.panels import Panel
from localsgd_jax.reporting.run_files import Run

# Columns of the horizontal axis, with their labels.
AXES = {
    "step": "local steps",
    "round": "rounds",
    "bytes": "bytes sent by each worker",
    "seconds": "seconds",
}
# Colours of Okabe and Ito, which are distinct with colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("solid", "dash", "dot")
_COLUMNS, _PANEL_HEIGHT, _MAX_POINTS = 2, 300, 1500


def import_plotly(call: str) -> ModuleType:
    """Imports plotly or raises an ImportError with the install command."""
    try:
        import plotly.graph_objects
        import plotly.io
        import plotly.subplots
    except ImportError:
        raise ImportError(f"{call}() needs plotly: pip install plotly") from None
    return plotly


def make_figure(plotly: ModuleType, runs: Sequence[Run], panels: Sequence[Panel]):
    """Returns a figure with a panel per quantity and a curve per run.

    Menus choose the column of the horizontal axes and linear or logarithmic scales. A
    click on a run in the legend shows or hides its curves in all panels.

    Args:
      plotly: the module.
      runs: the runs, with different names.
      panels: from `panels_of`.

    Returns:
      A `plotly.graph_objects.Figure`.
    """
    num_rows = -(-len(panels) // _COLUMNS)
    height = 160 + _PANEL_HEIGHT * num_rows
    figure = plotly.subplots.make_subplots(
        num_rows,
        _COLUMNS,
        subplot_titles=[panel.title for panel in panels],
        vertical_spacing=80 / height if num_rows > 1 else 0,
        horizontal_spacing=0.08,
    )
    axes = [name for name in AXES if any(name in run.columns for run in runs)]
    horizontal: dict[str, list] = {name: [] for name in axes}
    in_legend: set[int] = set()
    for position, panel in enumerate(panels):
        for i, values in panel.values.items():
            chosen = _thin(np.flatnonzero(np.isfinite(values)))
            for name in axes:
                column = runs[i].columns.get(name, np.full(len(values), np.nan))
                horizontal[name].append(column[chosen].tolist())
            figure.add_trace(
                plotly.graph_objects.Scatter(
                    x=horizontal[axes[0]][-1],
                    y=values[chosen].tolist(),
                    name=runs[i].name,
                    legendgroup=str(i),
                    showlegend=i not in in_legend,
                    **_style(i, len(chosen)),
                ),
                row=position // _COLUMNS + 1,
                col=position % _COLUMNS + 1,
            )
            in_legend.add(i)
    figure.update_xaxes(title={"text": AXES[axes[0]], "standoff": 4})
    figure.update_layout(
        height=height,
        template="plotly_white",
        margin={"t": 110, "l": 60, "r": 20, "b": 50},
        legend={"orientation": "h", "y": 1, "yanchor": "top", "yref": "container"},
        updatemenus=_menus(axes, horizontal, len(panels)),
    )
    return figure


def _thin(indices: np.ndarray) -> np.ndarray:
    """Returns at most `_MAX_POINTS` indices, with the first and the last."""
    if len(indices) <= _MAX_POINTS:
        return indices
    return indices[np.linspace(0, len(indices) - 1, _MAX_POINTS).round().astype(int)]


def _style(index: int, num_points: int) -> dict[str, Any]:
    """Returns colour and dashes of a run; few points are drawn as markers, too."""
    colour = _COLOURS[index % len(_COLOURS)]
    dash = _DASHES[index // len(_COLOURS) % len(_DASHES)]
    mode = "lines+markers" if num_points <= 30 else "lines"
    return {"mode": mode, "line": {"color": colour, "dash": dash, "width": 1.5}}


def _menus(axes: Sequence[str], horizontal: dict, num_panels: int) -> list[dict]:
    """Returns the menus for columns and scales of the axes."""
    names = ["" if i == 0 else str(i + 1) for i in range(num_panels)]

    def all_axes(letter: str, key: str, value: str) -> dict:
        return {f"{letter}axis{name}.{key}": value for name in names}

    columns = [
        {
            "label": AXES[name],
            "method": "update",
            "args": [{"x": horizontal[name]}, all_axes("x", "title.text", AXES[name])],
        }
        for name in axes
    ]
    menus = [{"buttons": columns, "x": 0.0}]
    for letter, title, x in (("x", "horizontal", 0.3), ("y", "vertical", 0.55)):
        buttons = [
            {
                "label": f"{title}: {scale}",
                "method": "relayout",
                "args": [all_axes(letter, "type", scale)],
            }
            for scale in ("linear", "log")
        ]
        menus.append({"buttons": buttons, "x": x})
    common = {"type": "dropdown", "xanchor": "left", "yanchor": "bottom"}
    return [{**common, "y": 1.0, "pad": {"b": 34}, **menu} for menu in menus]
