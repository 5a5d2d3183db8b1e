"""What every result says of the machine, and tables."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple


class Shown(NamedTuple):
    """What the figure shows of a measurement.

    Attributes:
      column: the numbers.
      labels: columns that say what they belong to.
      says: what the numbers are.
      aim: a line to compare them with.
    """

    column: str
    labels: tuple[str, ...]
    says: str
    aim: float = 1.0

    def label(self, row: dict) -> str:
        """Says what a row belongs to."""
        return ", ".join(_named(name, row[name]) for name in self.labels)


def machine() -> dict:
    """Says where and with what something was measured."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "jax": version("jax"),
        "optax": version("optax"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line for line in lines if line.startswith("model name")]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor()


def table(rows: Sequence[dict]) -> str:
    """Writes rows of equal keys as a table."""
    cells = [[*rows[0]], *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in cells)


def _named(name: str, value: object) -> str:
    """Returns a word as it is, and a number with its name."""
    return value if isinstance(value, str) else f"{name} {value:g}"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
