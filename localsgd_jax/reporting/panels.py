"""Choice of the panels of a report, by the columns of the runs."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from localsgd_jax.reporting.run_files import Run

DRIFT = ("consensus_distance", "effective_workers", "cosine", "momentum_cosine")
WAITING = ("wait_seconds", "sync_seconds", "compute_seconds")
_COUNTERS = ("step", "steps", "round", "seconds", "gradients", "straggler")
_MAX_METRICS = 8


class Panel(NamedTuple):
    """Curves of one quantity.

    Attributes:
      title: title of the panel.
      values: one number per round of each run, by index of the run.
    """

    title: str
    values: Mapping[int, np.ndarray]


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """Returns the panels of a report: metrics, bytes, drift and waiting.

    Args:
      runs: the runs.

    Returns:
      Panels with at least one curve; the loss is the first if there is one.
    """
    names = _metric_names(runs)
    found = [_panel(runs, name, name) for name in names]
    found.append(_panel(runs, "bytes", "bytes sent by each worker"))
    found.append(_panel(runs, "device_bytes", "bytes sent by each device"))
    norms = [name for name in _all_names(runs) if name.startswith("delta_norm")]
    found += [_panel(runs, name, f"drift: {name}") for name in (*DRIFT, *norms)]
    for name in WAITING:
        title = f"{name}, mean over processes"
        found.append(Panel(title, _curves(runs, lambda run, n=name: mean_of(run, n))))
    found.append(Panel("seconds per round", _curves(runs, _seconds_per_round)))
    return [panel for panel in found if panel.values]


def mean_of(run: Run, name: str) -> np.ndarray | None:
    """Returns the mean of a column over processes, NaN without a live process.

    Args:
      run: the run.
      name: name of a column with one number or an entry per process.

    Returns:
      One number per round; None if the run has no such column.
    """
    pattern = re.compile(rf"{re.escape(name)}(\.\d+)?")
    found = [x for column, x in run.columns.items() if pattern.fullmatch(column)]
    if not found:
        return None
    values, present = np.nan_to_num(found), np.isfinite(found)
    counts = present.sum(0)
    mean = values.sum(0) / np.maximum(counts, 1)
    return np.where(counts > 0, mean, np.nan)


def _all_names(runs: Sequence[Run]) -> list[str]:
    """Returns the names of the columns of all runs, in their order."""
    return [*dict.fromkeys(name for run in runs for name in run.columns)]


def _metric_names(runs: Sequence[Run]) -> list[str]:
    """Returns the first columns that are metrics, beginning with the loss."""
    special = {*_COUNTERS, "bytes", "device_bytes", "live_processes", *DRIFT}
    metrics = [
        name
        for name in _all_names(runs)
        if name not in special
        and not name.startswith(("delta_norm", *WAITING))
        and not re.search(r"\.\d+$", name)
    ]
    return sorted(metrics, key=lambda name: name != "loss")[:_MAX_METRICS]


def _panel(runs: Sequence[Run], name: str, title: str) -> Panel:
    """Returns the panel of a column."""
    return Panel(title, _curves(runs, lambda run: run.columns.get(name)))


def _curves(runs: Sequence[Run], values_of) -> dict[int, np.ndarray]:
    """Returns the values of the runs that have any finite ones."""
    found = {i: values_of(run) for i, run in enumerate(runs)}
    return {
        i: values
        for i, values in found.items()
        if values is not None and np.isfinite(values).any()
    }


def _seconds_per_round(run: Run) -> np.ndarray | None:
    """Returns the time between the ends of rounds; the first includes compilation."""
    seconds = run.columns.get("seconds")
    return None if seconds is None else np.diff(seconds, prepend=0.0)
