"""Records of a run in files: JSON lines, CSV, and run directories."""

import csv
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from localsgd_jax.core.validation import check, check_type
from localsgd_jax.distributed.environment import package_version
from localsgd_jax.reporting.rows import flat_row, json_row

HISTORY, CONFIG = "history", "config.json"
_PACKAGES = ("localsgd-jax", "jax", "jaxlib", "optax", "numpy")

Writer = Callable[[Mapping[str, Any]], None]


def to_jsonl(path: str | os.PathLike) -> Writer:
    """Returns a function that appends rows to a file of JSON lines.

    The file is closed after each row, so an interruption loses no earlier row. A run
    that is resumed continues the file, without the last line if its end is missing.

    Args:
      path: the file. Its directory must exist.

    Returns:
      A function for `train(on_round_end=...)`. A number that is not finite becomes
      null. It raises an OSError if the file cannot be written.

    Raises:
      TypeError: if `path` is no path.

    Example:
      >>> import pathlib, tempfile
      >>> directory = pathlib.Path(tempfile.mkdtemp())
      >>> write = to_jsonl(directory / "history.jsonl")
      >>> write({"step": 4, "round": 1, "loss": 0.5})
      >>> (directory / "history.jsonl").read_text()
      '{"step": 4, "round": 1, "loss": 0.5}\\n'
    """
    path = _checked_path("to_jsonl(path)", path)
    _remove_incomplete_line(path)

    def append(row: Mapping[str, Any]) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(json_row(row)) + "\n")

    return append


def to_csv(path: str | os.PathLike) -> Writer:
    """Returns a function that appends rows to a CSV file.

    A column that first occurs in a later row, such as that of an evaluation, is added
    to the header, and the file is written again. A run that is resumed continues the
    file, without the last line if its end is missing.

    Args:
      path: the file. Its directory must exist.

    Returns:
      A function for `train(on_round_end=...)`. Entry i of a vector has the column
      `name.i`. It raises an OSError if the file cannot be written.

    Raises:
      TypeError: if `path` is no path.

    Example:
      >>> import pathlib, tempfile
      >>> directory = pathlib.Path(tempfile.mkdtemp())
      >>> write = to_csv(directory / "history.csv")
      >>> write({"step": 4, "loss": 0.5}); write({"step": 8, "loss": 0.25, "error": 1})
      >>> (directory / "history.csv").read_text().split()
      ['step,loss,error', '4,0.5,', '8,0.25,1']
    """
    path = _checked_path("to_csv(path)", path)
    _remove_incomplete_line(path)
    stored = read_csv(path) if path.exists() else []
    names = [*stored[0]] if stored else []

    def append(row: Mapping[str, Any]) -> None:
        values = {name: _number_text(x) for name, x in flat_row(row).items()}
        if new := [name for name in values if name not in names]:
            rows = read_csv(path) if names else []
            names.extend(new)
            _write_csv(path, "w", names, [*rows, values], has_header=True)
        else:
            _write_csv(path, "a", names, [values], has_header=False)

    return append


def to_run_directory(directory: str | os.PathLike, config: Mapping[str, Any]) -> Writer:
    """Returns a function that records rows in a run directory.

    The directory holds `config.json`, the configuration with the versions of the
    packages, and `history.jsonl`, a line for each round. `localsgd report` reads it.

    Args:
      directory: created with its parents; may exist, as when a run is resumed.
      config: values by name; one without a form in JSON is written as its `repr`.

    Returns:
      A function for `train(on_round_end=...)`.

    Raises:
      TypeError: if `directory` is no path or `config` no mapping.
      OSError: if the directory cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> directory = pathlib.Path(tempfile.mkdtemp()) / "run"
      >>> write = to_run_directory(directory, {"period": 4})
      >>> write({"step": 4, "round": 1, "loss": 0.5})
      >>> sorted(path.name for path in directory.iterdir())
      ['config.json', 'history.jsonl']
    """
    path = _checked_path("to_run_directory(directory)", directory)
    check_type("to_run_directory(config)", "config", config, Mapping)
    path.mkdir(parents=True, exist_ok=True)
    content = {**config, "versions": versions()}
    text = json.dumps(content, indent=2, default=repr)
    (path / CONFIG).write_text(text + "\n", encoding="utf-8")
    return to_jsonl(path / f"{HISTORY}.jsonl")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages in use, by name."""
    return {"python": platform.python_version()} | {
        package: package_version(package) for package in _PACKAGES
    }


def read_csv(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file as text by column; empty for no value.

    A last line without its end may be cut within a number, and is skipped.
    """
    with open(path, newline="", encoding="utf-8") as file:
        lines = file.readlines()
    complete = [line for line in lines if line.endswith(("\n", "\r"))]
    reader = csv.DictReader(complete)
    names = list(reader.fieldnames or ())
    text = "every column must have a name of its own"
    check(len(set(names)) == len(names), str(path), text, names)
    return [{k: v or "" for k, v in row.items()} for row in reader]


def _write_csv(
    path: Path, mode: str, names: list[str], rows: list[dict], has_header: bool
) -> None:
    """Writes or appends rows with the given columns."""
    with open(path, mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        if has_header:
            writer.writeheader()
        writer.writerows(rows)


def _remove_incomplete_line(path: Path) -> None:
    """Cuts a file after its last complete line, as an interrupted write left it."""
    if path.exists() and (content := path.read_bytes()):
        os.truncate(path, content.rfind(b"\n") + 1)


def _number_text(value: float) -> str:
    """Returns the shortest text of a number; empty for NaN."""
    if value != value:
        return ""
    return str(int(value)) if value.is_integer() else repr(value)


def _checked_path(call: str, path: str | os.PathLike) -> Path:
    """Returns an argument as a path."""
    check_type(call, call.partition("(")[2].rstrip(")"), path, str, os.PathLike)
    return Path(path)
