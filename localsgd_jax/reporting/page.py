"""HTML page of runs: tables of results and configurations, and a figure."""

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from localsgd_jax.core.validation import check, check_type, describe
from localsgd_jax.reporting.figure import import_plotly, make_figure
from localsgd_jax.reporting.panels import DRIFT, WAITING, mean_of, panels_of
from localsgd_jax.reporting.run_files import Run

_TOTALS = ("step", "round", "bytes", "device_bytes", "seconds")
_STYLE = """
body { font-family: system-ui, sans-serif; margin: 1.5em; color: #222; }
table { border-collapse: collapse; font-size: 0.9em; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25em 0.8em; text-align: left; }
td { font-variant-numeric: tabular-nums; }
tr.differs th, tr.differs td { background: #fff3cd; }
tr.differs th::before { content: "\\2260\\00a0"; }
.scroll { overflow-x: auto; }
"""


def write_report(runs: Sequence[Run], path: str | os.PathLike) -> None:
    """Writes a page that compares runs and needs no other file and no network.

    The page has a table of the last values of each run, the configurations in columns
    with a mark at the rows that differ, and a figure of the columns of the histories.

    Args:
      runs: at least one, from `read_run`.
      path: the HTML file.

    Raises:
      ImportError: if Plotly is not installed.
      TypeError: if `runs` has other elements, or `path` is no path.
      ValueError: if there is no run, a run has no column "step", its columns differ in
        length or do not hold real numbers, or no run has other columns than "step".
      OSError: if the file cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> columns = {"step": np.array([4.0, 8.0]), "loss": np.array([1.0, 0.5])}
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "report.html"
      >>> write_report([Run("first", {"period": 4}, columns)], path)
      >>> "<th>period</th><td>4</td>" in path.read_text()
      True
    """
    call = "write_report(runs)"
    check_type(call, "runs", runs, Sequence)
    check(runs, call, "there must be at least one run", len(runs))
    for run in runs:
        check_type(call, "each run", run, Run)
        named = repr(run.name)
        check("step" in run.columns, call, 'each run must have a column "step"', named)
        _check_columns(call, run)
    check_type("write_report(path)", "path", path, str, os.PathLike)
    plotly = import_plotly("write_report")
    runs, panels = _with_distinct_names(runs), panels_of(runs)
    text = "a run must have numbers besides its steps"
    check(panels, call, text, [run.name for run in runs])
    figure = make_figure(plotly, runs, panels)
    drawn = plotly.io.to_html(
        figure,
        full_html=False,
        include_plotlyjs=True,
        div_id="figure",
        config={"displaylogo": False, "responsive": True},
    )
    Path(path).write_text(_page(runs, drawn), encoding="utf-8")


def _check_columns(call: str, run: Run) -> None:
    """Raises unless a run has a configuration and real columns of one length."""
    check_type(call, "the configuration of a run", run.config, Mapping)
    length = np.shape(run.columns["step"])
    for name, column in run.columns.items():
        is_real = np.asarray(column).dtype.kind in "biuf"
        text = f"column {name!r} of {run.name!r} must have a real number per row"
        holds = is_real and len(length) == 1 and np.shape(column) == length
        check(holds, call, text, describe(column))


def _page(runs: Sequence[Run], figure: str) -> str:
    """Returns the page as text."""
    names = [run.name for run in runs]
    results = {name: [_last(run, name) for run in runs] for name in _result_names(runs)}
    configs = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    settings = {key: [config.get(key, "–") for config in configs] for key in keys}
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<link rel="icon" href="data:,"><title>Local SGD runs</title>',
        f"<style>{_STYLE}</style></head><body><h1>Local SGD runs</h1>",
        "<h2>Last values</h2>",
        _table(names, results, marks=False),
        figure,
        "<h2>Configuration</h2>",
        _table(names, settings, marks=True) if settings else "<p>None recorded.</p>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _table(names: Sequence[str], rows: Mapping[str, Sequence[str]], marks: bool) -> str:
    """Returns a table with a column per run; marks rows with different cells."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = [f"<tr><th></th>{head}</tr>"]
    for key, cells in rows.items():
        differs = marks and len(set(cells)) > 1
        columns = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        kind = ' class="differs"' if differs else ""
        lines.append(f"<tr{kind}><th>{html.escape(key)}</th>{columns}</tr>")
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def _result_names(runs: Sequence[Run]) -> list[str]:
    """Returns the names of the last values: totals, metrics, drift, total waiting."""
    titles = [panel.title for panel in panels_of(runs)]
    present = {name for run in runs for name in run.columns}
    metrics = [title for title in titles if title in present and title not in _TOTALS]
    drift = [name for name in DRIFT if name in present]
    waiting = [
        name for name in WAITING if any(mean_of(r, name) is not None for r in runs)
    ]
    totals = [name for name in _TOTALS if name in present]
    return [*totals, *metrics, *drift, *(f"sum of {name}" for name in waiting)]


def _last(run: Run, name: str) -> str:
    """Returns the last finite value of a column, or the sum of a column of waiting."""
    if name.startswith("sum of "):
        values = mean_of(run, name.removeprefix("sum of "))
        return "–" if values is None else f"{np.nansum(values):.4g}"
    values = run.columns.get(name, np.empty(0))
    finite = values[np.isfinite(values)]
    if not finite.size:
        return "–"
    return f"{finite[-1]:,.0f}" if name in _TOTALS[:-1] else f"{finite[-1]:.6g}"


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns the entries of a nested configuration as text, by path."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _with_distinct_names(runs: Sequence[Run]) -> list[Run]:
    """Returns runs with a number in the names that occur several times."""
    names = [run.name for run in runs]
    return [
        run._replace(name=f"{run.name} ({names[:i].count(run.name) + 1})")
        if names.count(run.name) > 1
        else run
        for i, run in enumerate(runs)
    ]
