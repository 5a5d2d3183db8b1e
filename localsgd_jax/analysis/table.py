"""Text tables of collective ops."""

import math
from collections import Counter
from collections.abc import Iterable

from localsgd_jax.analysis.collective_op import Branch, CollectiveOp, Loop, check_ops

_HEADINGS = (
    *("collective", "type", "bytes", "sent ICI", "sent DCN", "axes"),
    *("control flow", "overlaps", "source"),
)


def format_table(ops: Iterable[CollectiveOp]) -> str:
    """Formats collective ops as a table, one line per op.

    The columns: name, element types, bytes of the operands on a device, bytes that a
    device sends per execution inside its TPU slice or host (ICI) and across slices or
    hosts (DCN), mesh axes, loops and branches around the op ("always" if there are
    none), opcodes that run between start and done ("synchronous" if the devices wait
    for the op), and source location. Unknown numbers and axes are "?".

    Args:
      ops: collective ops.

    Returns:
      The lines of the table.

    Raises:
      TypeError: if the ops are no collective ops.

    Example:
      >>> groups = ((0, 1, 2, 3, 4, 5, 6, 7),)
      >>> op = CollectiveOp("all-reduce", ("f32",), 80, 140.0, groups, ("worker",),
      ...                   (Loop("while", 3),))
      >>> format_table([op]).splitlines()[1].split()[:6]
      ['all-reduce', 'f32', '80', '140', '0', 'worker']
    """
    ops = check_ops("format_table(ops)", ops)
    rows = [_HEADINGS, *map(_format_row, ops)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def describe_op(op: CollectiveOp) -> str:
    """Returns the name of an op, with the reason if it is not understood."""
    return f"{op.name}: {op.problem}" if op.problem else op.name


def _format_bytes(sent: float) -> str:
    """Formats bytes; "?" for an op that is not understood."""
    return "?" if math.isinf(sent) else f"{sent:.0f}"


def _format_row(op: CollectiveOp) -> tuple[str, ...]:
    """Formats the cells of an op."""
    return (
        describe_op(op),
        "+".join(op.dtypes),
        f"{op.bytes}",
        _format_bytes(op.ici_bytes_sent),
        _format_bytes(op.dcn_bytes_sent),
        "?" if op.axes is None else "+".join(op.axes) or "none",
        ", ".join(map(_format_control_flow, op.control_flow)) or "always",
        _format_overlap(op.overlapped_ops),
        str(op.source or "unknown"),
    )


def _format_control_flow(scope: Loop | Branch) -> str:
    """Formats a loop or a branch."""
    if isinstance(scope, Branch):
        return f"branch {scope.index + 1} of {scope.count}"
    return f"loop of {'?' if scope.trip_count is None else scope.trip_count}"


def _format_overlap(opcodes: tuple[str, ...] | None) -> str:
    """Formats the overlapped opcodes with their counts."""
    if opcodes is None:
        return "synchronous"
    counts = Counter(opcodes).items()
    parts = (name if count == 1 else f"{count} {name}" for name, count in counts)
    return ", ".join(parts) or "nothing"
