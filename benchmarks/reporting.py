"""Machine description, figure specifications and text tables of measurements."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple


class FigureSpec(NamedTuple):
    """Specification of the panel of a measurement in the summary figure.

    Attributes:
      column: column to plot.
      labels: columns that identify a row.
      title: label of the axis.
      target: value of the reference line.
    """

    column: str
    labels: tuple[str, ...]
    title: str
    target: float = 1.0

    def label(self, row: dict) -> str:
        """Returns the label of a row."""
        return ", ".join(_format_label(name, row[name]) for name in self.labels)


def machine() -> dict:
    """Returns processor, cores, load and versions of this machine."""
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


def format_table(rows: Sequence[dict]) -> str:
    """Formats rows with equal keys as a text table."""
    cells = [
        [*rows[0]],
        *([_format_cell(value) for value in row.values()] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in cells)


def _format_label(name: str, value: object) -> str:
    """Returns text as it is, and a number with its name."""
    return value if isinstance(value, str) else f"{name} {value:g}"


def _format_cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
