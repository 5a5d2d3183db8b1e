"""Output files of an experiment: settings, a resumable CSV table and findings."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm


class Finding(NamedTuple):
    """An expectation of the paper or the theory, and the observed result."""

    expected: str
    observed: str


class ResumableTable:
    """Rows of NAME.csv, written one at a time.

    A table that is opened again with the same settings contains the earlier rows, also
    after an interruption in the middle of a row.
    """

    def __init__(
        self, directory: Path, name: str, settings: Mapping, columns: Sequence[str]
    ) -> None:
        """Opens or creates the table.

        Args:
          directory: directory of the files, created if it does not exist.
          name: name of the experiment.
          settings: all values on which the rows depend, stored in NAME.json.
          columns: names of the columns.

        Raises:
          ValueError: if the existing table has other settings or columns.
          OSError: if a file cannot be read or written.
        """
        self.path, self.columns = directory / f"{name}.csv", list(columns)
        directory.mkdir(parents=True, exist_ok=True)
        _check_settings(directory / f"{name}.json", self.path, settings)
        if not self.path.exists():
            self._write(self.columns, "w")
        self.rows = list(_read(self.path, self.columns))

    def append(self, row: Mapping) -> None:
        """Appends a row; None is written as an empty cell."""
        self._write([row[name] for name in self.columns], "a")
        self.rows.append(dict(row))

    def _write(self, values: Sequence, mode: str) -> None:
        """Writes one line and closes the file, so an interruption loses no line."""
        with open(self.path, mode, newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(values)


def run_table(
    table: ResumableTable,
    keys: Sequence[Any],
    prepare: Callable[[], Callable[[Any, Sequence[dict]], Mapping]],
    work: Callable[[Any], int] = lambda key: 1,
    unit: str = "row",
) -> list[dict]:
    """Computes the missing rows of a table, with a progress bar.

    Args:
      table: the table; its rows belong to the first keys.
      keys: one key per row, in order.
      prepare: called once if rows are missing; returns `make_row(key, earlier_rows)`.
      work: amount of work of a key, for the progress bar.
      unit: unit of the work.

    Returns:
      All rows.
    """
    missing = keys[len(table.rows) :]
    if missing:
        make_row, total = prepare(), sum(map(work, missing))
        name = table.path.stem
        with tqdm(total=total, desc=name, unit=unit, disable=None) as bar:
            for key in missing:
                table.append(make_row(key, table.rows))
                bar.update(work(key))
    return table.rows


def write_rows(path: Path, rows: Sequence[Mapping]) -> None:
    """Writes a complete CSV table of at least one row; all rows have the same keys."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_findings(directory: Path, name: str, findings: Iterable[Finding]) -> str:
    """Writes expected and observed results to NAME.txt and returns the text."""
    lines = [
        f"{name}: expected: {finding.expected}\n{name}: observed: {finding.observed}"
        for finding in findings
    ]
    text = "\n".join(lines) + "\n"
    (directory / f"{name}.txt").write_text(text, encoding="utf-8")
    return text


def _check_settings(path: Path, table: Path, settings: Mapping) -> None:
    """Compares the settings with the stored ones, or stores them."""
    requested = json.loads(json.dumps(settings))
    if not path.exists():
        if table.exists():
            raise ValueError(f"--out: {table} exists without {path.name}")
        path.write_text(json.dumps(requested, indent=2) + "\n", encoding="utf-8")
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    differences = [
        f"{name} must be {stored.get(name)!r}, got {requested.get(name)!r}"
        for name in sorted(stored.keys() | requested.keys())
        if stored.get(name) != requested.get(name)
    ]
    if differences:
        raise ValueError(
            f"--out: {table} was written with other settings: {'; '.join(differences)}"
        )


def _read(path: Path, columns: list[str]) -> Iterator[dict]:
    """Yields the complete rows; removes an incomplete last line from the file."""
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        path.write_text(complete, encoding="utf-8")
    header, *rows = csv.reader(complete.splitlines())
    if header != columns:
        raise ValueError(f"--out: {path} must have the columns {columns}, got {header}")
    for row in rows:
        yield {name: _parse(cell) for name, cell in zip(columns, row, strict=True)}


def _parse(cell: str) -> int | float | str | None:
    """Parses a cell as int, float, text or None."""
    for number_type in (int, float):
        try:
            return number_type(cell)
        except ValueError:
            pass
    return cell or None
