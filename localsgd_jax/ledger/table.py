"""The ledger as a table to read."""

from collections import Counter
from collections.abc import Iterable

from localsgd_jax.ledger.entries import Branch, Entry, Loop

_HEADINGS = ("collective", "type", "bytes", "sent", "axes", "runs", "beside", "source")


def table(entries: Iterable[Entry]) -> str:
    """Writes the entries as a table, one line for each.

    The columns: the collective, the types of its elements, the bytes of a device's
    operands, those that a device sends each time, the mesh axes, when it runs, what
    runs between its start and its end ("waits" if devices wait for it), and the line
    of source.

    Args:
      entries: of a ledger.

    Returns:
      The lines.

    Example:
      >>> print(table([Entry("all-reduce", ("f32",), 80, 140.0, ((0, 1),), ("worker",),
      ...                    (Branch("cond", 1, 2), Loop("while", 3)))]))
      collective  type  bytes  sent  axes    runs                      beside  source
      all-reduce  f32   80     140   worker  branch 2 of 2, loop of 3  waits   unknown
    """
    rows = [_HEADINGS, *map(_row, entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _row(entry: Entry) -> tuple[str, ...]:
    """Writes the cells of an entry."""
    return (
        entry.name,
        "+".join(entry.dtypes),
        f"{entry.bytes}",
        f"{entry.sent:.0f}",
        "?" if entry.axes is None else "+".join(entry.axes) or "none",
        ", ".join(map(_where, entry.path)) or "always",
        "waits" if entry.beside is None else _work(entry.beside),
        str(entry.source or "unknown"),
    )


def _where(place: Loop | Branch) -> str:
    """Names a loop or a branch."""
    if isinstance(place, Branch):
        return f"branch {place.index + 1} of {place.count}"
    return f"loop of {'?' if place.times is None else place.times}"


def _work(beside: tuple[str, ...]) -> str:
    """Counts the opcodes that run beside a collective."""
    counts = Counter(beside).items()
    listed = (name if count == 1 else f"{count} {name}" for name, count in counts)
    return ", ".join(listed) or "nothing"
