"""Bytes sent by a program with loops and conditionals."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from localsgd_jax.analysis.collective_op import (
    Branch,
    CollectiveOp,
    Loop,
    check_ops,
    filter_by_axis,
)
from localsgd_jax.core.validation import check_choice, check_names

# Minimum and maximum bytes.
_Range: TypeAlias = tuple[float, float]
_BYTES_OF_NETWORK: Mapping[str | None, Callable[[CollectiveOp], float]] = {
    None: lambda op: op.bytes_sent,
    "ici": lambda op: op.ici_bytes_sent,
    "dcn": lambda op: op.dcn_bytes_sent,
}


def total_bytes_sent(
    ops: Iterable[CollectiveOp],
    axis: str | Sequence[str] | None = None,
    network: str | None = None,
) -> tuple[float, float]:
    """Returns the minimum and maximum bytes that a device sends per execution.

    Loops count with their trip count. If the branches of a conditional differ, the
    cheapest branch counts for the minimum and the most expensive one for the maximum.

    Args:
      ops: collective ops of one program.
      axis: one mesh axis, or several; None for all. An op along several axes counts
        for each of them.
      network: "ici" for the bytes inside a TPU slice or host, "dcn" for those across
        slices or hosts; None for both.

    Returns:
      The minimum and maximum bytes. A loop without a static trip count, or an op that
      is not understood, contributes 0 to the minimum and infinity to the maximum.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if the network is neither.

    Example:
      >>> groups = ((0, 1, 2, 3, 4, 5, 6, 7),)
      >>> psum = CollectiveOp("all-reduce", ("f32",), 80, 140.0, groups, ("worker",),
      ...                     (Branch("cond", 1, 2), Loop("while", 3)))
      >>> total_bytes_sent([psum]), total_bytes_sent([psum], axis="model")
      ((0, 420.0), (0, 0))
    """
    call = "total_bytes_sent"
    if network is not None:
        check_choice(f"{call}(network)", "network", network, ("ici", "dcn"))
    if axis is not None:
        check_names(f"{call}(axis)", "axis", axis)
    ops = check_ops(f"{call}(ops)", ops)
    root = _Sequence()
    for op in filter_by_axis(ops, axis):
        root.add(op.control_flow, _BYTES_OF_NETWORK[network](op))
    return root.bytes_range()


@dataclass
class _Sequence:
    """A node of the control-flow tree: ops, loops and conditionals that all run.

    Attributes:
      ops: bytes sent by the ops outside inner loops and conditionals.
      loops: bodies of the loops.
      conditionals: branches of the conditionals, by name.
    """

    ops: list[float] = field(default_factory=list)
    loops: "dict[Loop, _Sequence]" = field(default_factory=dict)
    conditionals: "dict[str, dict[Branch, _Sequence]]" = field(default_factory=dict)

    def add(self, control_flow: Sequence[Loop | Branch], bytes_sent: float) -> None:
        """Adds an op below its loops and branches, outermost first."""
        if not control_flow:
            self.ops.append(bytes_sent)
            return
        scope, *inner = control_flow
        if isinstance(scope, Loop):
            child = self.loops.setdefault(scope, _Sequence())
        else:
            branches = self.conditionals.setdefault(scope.name, {})
            child = branches.setdefault(scope, _Sequence())
        child.add(inner, bytes_sent)

    def bytes_range(self) -> _Range:
        """Returns the sum over the node."""
        parts = [(0 if math.isinf(sent) else sent, sent) for sent in self.ops]
        parts += [_loop_range(loop, body) for loop, body in self.loops.items()]
        parts += map(_conditional_range, self.conditionals.values())
        min_bytes = sum(low for low, _ in parts)
        return min_bytes, sum(high for _, high in parts)


def _loop_range(loop: Loop, body: _Sequence) -> _Range:
    """Returns the bytes of all iterations of a loop."""
    min_bytes, max_bytes = body.bytes_range()
    if loop.trip_count is None:
        return 0, math.inf if max_bytes else 0
    if not loop.trip_count:
        return 0, 0
    return loop.trip_count * min_bytes, loop.trip_count * max_bytes


def _conditional_range(branches: dict[Branch, _Sequence]) -> _Range:
    """Returns the bytes of the cheapest and of the most expensive branch."""
    ranges = [branch.bytes_range() for branch in branches.values()]
    # A branch without ops is not in the tree and sends nothing.
    some_branch_is_empty = len(branches) < next(iter(branches)).count
    min_bytes = 0 if some_branch_is_empty else min(low for low, _ in ranges)
    return min_bytes, max(high for _, high in ranges)
