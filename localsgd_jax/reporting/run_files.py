"""Records of runs, read as columns."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from localsgd_jax.core.validation import check_type
from localsgd_jax.reporting.records import CONFIG, HISTORY, read_csv
from localsgd_jax.reporting.rows import flat_row

# Columns that count from the beginning of a call of `train`.
_SINCE_CALL: tuple[str, ...] = ("seconds", "bytes", "device_bytes")


class Run(NamedTuple):
    """Record of a run.

    Attributes:
      name: name in legends and tables.
      config: configuration, perhaps nested; empty if it is unknown.
      columns: one number per round by name, float64; NaN where a row lacks it.
    """

    name: str
    config: Mapping[str, Any]
    columns: Mapping[str, np.ndarray]


def read_run(path: str | os.PathLike) -> Run:
    """Reads a run directory, or a file of JSON lines or CSV.

    Rows of several calls of `train` in one file become one run: the columns "seconds",
    "bytes" and "device_bytes" continue, and a run that was resumed from a checkpoint
    replaces the rows after its step. A last line that is incomplete is skipped.

    Args:
      path: directory with `history.jsonl` or `history.csv` and perhaps `config.json`,
        such as that of `localsgd train` or `to_run_directory`; or a file `*.jsonl` or
        `*.csv`.

    Returns:
      The run, with the path as its name.

    Raises:
      TypeError: if `path` is no path.
      OSError: if there is no such file.
      ValueError: if a file does not hold rows of a history.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "history.jsonl"
      >>> _ = path.write_text('{"step": 4, "loss": 1}\\n{"step": 8, "loss": null}\\n')
      >>> read_run(path).columns["loss"]
      array([ 1., nan])
    """
    check_type("read_run(path)", "path", path, str, os.PathLike)
    path = Path(path)
    file = _history_file(path) if path.is_dir() else path
    read_rows = _read_csv_rows if file.suffix == ".csv" else _read_json_rows
    try:
        rows = read_rows(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: the file must be text in UTF-8, {error}") from None
    if not rows:
        raise ValueError(f"{file}: the file must hold rows of a history, got none")
    try:
        columns = columns_of(rows)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return Run(str(path), _read_config(path), columns)


def columns_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Returns rows as columns that continue over several calls of `train`.

    Args:
      rows: of a history, in the order in which they were written.

    Returns:
      One number per row by name, float64, NaN where a row lacks it.

    Raises:
      TypeError: if `rows` does not consist of mappings.

    Example:
      >>> first, second = {"step": 4, "seconds": 9}, {"step": 8, "seconds": 1}
      >>> columns_of([first, second])["seconds"]
      array([ 9., 10.])
    """
    check_type("columns_of(rows)", "rows", rows, Iterable)
    rows = list(rows)
    for row in rows:
        check_type("columns_of(rows)", "each row", row, Mapping)
    joined = _join_calls([flat_row(row) for row in rows])
    names = dict.fromkeys(name for row in joined for name in row)
    return {name: np.array([row.get(name, np.nan) for row in joined]) for name in names}


def _join_calls(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Joins the rows of several calls of `train`, with running sums."""
    joined: list[dict[str, float]] = []
    offsets, previous = dict.fromkeys(_SINCE_CALL, 0.0), None
    for row in rows:
        if previous is not None and _begins_call(previous, row):
            joined = [x for x in joined if x.get("step", 0) < row.get("step", np.inf)]
            offsets = {
                name: joined[-1].get(name, 0.0) if joined else 0.0 for name in offsets
            }
        sums = {name: row[name] + offsets[name] for name in offsets if name in row}
        joined.append(row | sums)
        previous = row
    return joined


def _begins_call(previous: Mapping[str, float], row: Mapping[str, float]) -> bool:
    """Returns whether a row is the first one of a further call of `train`."""
    names = ("step", *_SINCE_CALL)
    return any(row.get(name, np.inf) < previous.get(name, 0) for name in names) or (
        row.get("step") == previous.get("step") and "step" in row
    )


def _history_file(directory: Path) -> Path:
    """Returns the history of a run directory."""
    for suffix in (".jsonl", ".csv"):
        if (path := directory / f"{HISTORY}{suffix}").exists():
            return path
    missing = directory / f"{HISTORY}.jsonl"
    raise FileNotFoundError(2, "no such file, and no history.csv", str(missing))


def _read_config(path: Path) -> dict:
    """Returns the configuration of a run directory; empty if there is none."""
    file = path / CONFIG
    if not path.is_dir() or not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: the file must hold a JSON object, got {config!r}")
    return config


def _read_json_rows(file: Path) -> list[dict]:
    """Reads JSON lines; an incomplete last line of an interrupted run is skipped."""
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines) or row is not None:
            raise ValueError(
                f"{file}: each line must be a JSON object, got {line[:40]!r} in line "
                f"{number}"
            )
    return rows


def _read_csv_rows(file: Path) -> list[dict]:
    """Reads a CSV file; empty fields are missing values."""
    rows = []
    for number, row in enumerate(read_csv(file), 2):
        try:
            rows.append({name: float(x or "nan") for name, x in row.items() if name})
        except ValueError:
            raise ValueError(
                f"{file}: each field must be a number, got line {number}"
            ) from None
    return rows
