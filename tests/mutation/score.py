"""Computes the mutation score of each group from the rows of a run.

From `tests/`, `python -m mutation.score [ROWS]` prints the table of the documentation.
"""

import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from mutation.covering_tests import GROUPS
from mutation.equivalents import EQUIVALENT

ROWS = pathlib.Path(__file__).parent / "results" / "rows.jsonl"


class Score(NamedTuple):
    """Counts of one group; the score is killed / (drawn − equivalent)."""

    drawn: int
    killed: int
    equivalent: int

    @property
    def survived(self) -> int:
        """Number of mutants that are not equivalent and not detected."""
        return self.drawn - self.killed - self.equivalent

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson interval of 95 % of the share of mutants that are detected."""
        n = self.drawn - self.equivalent
        if n == 0:
            return 0.0, 1.0
        z, p = 1.96, self.killed / n
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        return middle - half, min(middle + half, 1.0)


def score(rows: Sequence[dict]) -> Score:
    """Counts the outcomes of rows."""
    survivors = [row["name"] for row in rows if row["outcome"] == "survived"]
    equivalent = sum(name in EQUIVALENT for name in survivors)
    return Score(len(rows), len(rows) - len(survivors), equivalent)


def table(rows: Sequence[dict]) -> str:
    """Formats a Markdown table with a line per group and the total."""
    lines = [
        "| group | drawn | killed | equivalent | survived | score | 95 % interval |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups = {
        group: [row for row in rows if row["group"] == group] for group in GROUPS
    } | {"all": rows}
    for group, members in groups.items():
        s = score(members)
        n, (low, high) = s.drawn - s.equivalent, s.interval
        share = f"{s.killed / n:.0%}" if n else "–"
        lines.append(
            f"| {group} | {s.drawn} | {s.killed} | {s.equivalent} | {s.survived} "
            f"| {share} | {low:.0%} to {high:.0%} |"
        )
    return "\n".join(lines)


def main(paths: Sequence[str]) -> None:
    """Prints the table and the survivors."""
    file = pathlib.Path(paths[0]) if paths else ROWS
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    first = {row["name"]: row for row in reversed(lines)}
    print(f"Before tests for survivors:\n\n{table(list(first.values()))}\n")
    # The last row of a mutant counts: survivors are repeated with new tests.
    rows = list({row["name"]: row for row in lines}.values())
    print(f"With them:\n\n{table(rows)}")
    for row in rows:
        if row["outcome"] == "survived":
            reason = EQUIVALENT.get(row["name"], "not detected")
            print(f"\n{row['name']}, line {row['line']}: {reason}")
            print(f"- {row['old']}\n+ {row['new']}")


if __name__ == "__main__":
    main(sys.argv[1:])
