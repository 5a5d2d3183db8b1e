"""What an experiment leaves: settings, a table that can be resumed, a verdict."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Verdict(NamedTuple):
    """What the paper or the theory promises, and what came out."""

    expected: str
    seen: str


class Table:
    """Rows in NAME.csv, each written as soon as it is known.

    Opened again with the same settings it has the rows of the run before, also after
    an interruption in the middle of a row.
    """

    def __init__(
        self, directory: Path, name: str, settings: Mapping, columns: Sequence[str]
    ) -> None:
        """Opens or starts the table; refuses one of other settings.

        Args:
          directory: where; it is made if it does not exist.
          name: of the experiment.
          settings: all that the rows depend on.
          columns: their names.

        Raises:
          ValueError: if the table there was made with other settings.
          OSError: if it cannot be read or written.
        """
        self.path, self.columns = directory / f"{name}.csv", list(columns)
        directory.mkdir(parents=True, exist_ok=True)
        _check_settings(directory / f"{name}.json", self.path, settings)
        if not self.path.exists():
            self._write(self.columns, "w")
        self.rows = list(_read(self.path, self.columns))

    def append(self, row: Mapping) -> None:
        """Adds a row.

        Args:
          row: a value for each column; None stays blank.
        """
        self._write([row[name] for name in self.columns], "a")
        self.rows.append(dict(row))

    def _write(self, values: Sequence, mode: str) -> None:
        """Writes one line and closes the file, so that nothing is lost later."""
        with open(self.path, mode, newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(values)


def write_rows(path: Path, rows: Sequence[Mapping]) -> None:
    """Writes a whole table that follows from others.

    Args:
      path: of the CSV file.
      rows: at least one, all with the same names.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_verdicts(directory: Path, name: str, verdicts: Iterable[Verdict]) -> str:
    """Writes NAME.txt: what was expected, and what was seen.

    Args:
      directory: where.
      name: of the experiment.
      verdicts: at least one.

    Returns:
      The text.
    """
    lines = [
        f"{name}: expected: {verdict.expected}\n{name}: seen: {verdict.seen}"
        for verdict in verdicts
    ]
    text = "\n".join(lines) + "\n"
    (directory / f"{name}.txt").write_text(text, encoding="utf-8")
    return text


def _check_settings(path: Path, table: Path, settings: Mapping) -> None:
    """Compares settings with those of the run before, or writes them."""
    wanted = json.loads(json.dumps(settings))
    if not path.exists():
        if table.exists():
            raise ValueError(f"--out: {table} is there without its {path.name}")
        path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    differ = [
        f"{name} = {found.get(name)!r} there, {wanted.get(name)!r} here"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differ:
        raise ValueError(
            f"--out: {table} was made with other settings: {'; '.join(differ)}"
        )


def _read(path: Path, columns: list[str]) -> Iterator[dict]:
    """Reads the complete rows and drops a last one that was cut short."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    header, *rows = csv.reader(whole.splitlines())
    if header != columns:
        raise ValueError(f"--out: {path} has the columns {header}, not {columns}")
    for row in rows:
        yield {name: _parsed(cell) for name, cell in zip(columns, row, strict=True)}


def _parsed(cell: str) -> int | float | str | None:
    """Turns a cell back into what it was."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell or None
