"""Collective ops and the control flow around them."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from localsgd_jax.analysis.device_layout import Groups
from localsgd_jax.analysis.hlo import source_locations
from localsgd_jax.core.validation import check_names, check_type

NOT_UNDERSTOOD = "not understood"


class Loop(NamedTuple):
    """A while loop around a collective.

    Attributes:
      name: name of the `while` instruction.
      trip_count: number of iterations; None if it is not static.
    """

    name: str
    trip_count: int | None


class Branch(NamedTuple):
    """A branch of a conditional around a collective.

    Attributes:
      name: name of the `conditional` instruction.
      index: index of the branch.
      count: number of branches of the conditional.
    """

    name: str
    index: int
    count: int


# Loops and branches around an op, outermost first.
ControlFlow: TypeAlias = tuple[Loop | Branch, ...]


class CollectiveOp(NamedTuple):
    """A collective op of a compiled program.

    Attributes:
      name: such as `all-reduce`; also for the asynchronous form `all-reduce-start` and
        for a transfer across TPU slices of that kind. `not understood` for an
        instruction that may leave the device in a way that the analysis cannot read.
      dtypes: element types of the operands, such as `("f32",)`.
      bytes: size of the operands on one device, per execution.
      bytes_sent: bytes that a device sends per execution, by the ring formulas;
        infinity if the op is not understood.
      groups: device groups, by position in the mesh.
      axes: mesh axes along which the groups extend; None if no mesh is known, or if
        the op is not understood.
      control_flow: loops and branches around the op, outermost first.
      overlapped_ops: opcodes that run between start and done of an asynchronous op,
        which may be none; None for a synchronous op.
      stack_frames: source locations, innermost first. The TPU compiler records none
        for a transfer across slices; it then has those of the next instruction that
        uses the result.
      async_chain_id: identifier that the TPU compiler gives to all pieces of a
        collective that it splits over other work, such as a loop of local steps.
        Empty for other ops. The pieces are merged into one op.
      dcn_bytes_sent: the part of `bytes_sent` that crosses TPU slices, or processes
        of other devices.
      problem: why the op is not understood, such as `custom call "f"`; else empty.
    """

    name: str
    dtypes: tuple[str, ...]
    bytes: int
    bytes_sent: float
    groups: Groups
    axes: tuple[str, ...] | None
    control_flow: ControlFlow = ()
    overlapped_ops: tuple[str, ...] | None = None
    stack_frames: tuple[source_locations.Frame, ...] = ()
    async_chain_id: str = ""
    dcn_bytes_sent: float = 0.0
    problem: str = ""

    @property
    def ici_bytes_sent(self) -> float:
        """The part of `bytes_sent` that stays inside a TPU slice or process."""
        if math.isinf(self.bytes_sent):
            return math.inf
        return self.bytes_sent - self.dcn_bytes_sent

    @property
    def in_branch(self) -> bool:
        """Whether the op is inside a branch of a conditional."""
        return any(isinstance(scope, Branch) for scope in self.control_flow)

    @property
    def in_loop(self) -> bool:
        """Whether the op is inside a loop."""
        return any(isinstance(scope, Loop) for scope in self.control_flow)

    @property
    def trip_count(self) -> int | None:
        """Number of executions if its branches are taken; None if not static."""
        total = 1
        for scope in self.control_flow:
            if isinstance(scope, Loop):
                if scope.trip_count is None:
                    return None
                total *= scope.trip_count
        return total

    @property
    def source(self) -> source_locations.Frame | None:
        """The innermost stack frame in user code."""
        return source_locations.user_frame(self.stack_frames)


def check_ops(call: str, ops: Iterable) -> tuple[CollectiveOp, ...]:
    """Returns collective ops as a tuple; raises a TypeError for anything else."""
    check_type(call, "ops", ops, Iterable)
    ops = tuple(ops)
    for op in ops:
        check_type(call, "each of the ops", op, CollectiveOp)
    return ops


def filter_by_axis(
    ops: Iterable[CollectiveOp], axis: str | Sequence[str] | None
) -> tuple[CollectiveOp, ...]:
    """Returns the ops along a mesh axis, including ops with unknown axes.

    Args:
      ops: collective ops.
      axis: one mesh axis, or several of which one must match; None for all.

    Returns:
      The matching ops. An op that is not understood matches every axis.

    Raises:
      TypeError: if an argument has the wrong type.
    """
    call = "filter_by_axis(axis)"
    is_all = axis is None or (isinstance(axis, list | tuple) and not axis)
    names = () if is_all else check_names(call, "axis", axis)
    ops, names = check_ops("filter_by_axis(ops)", ops), set(names)
    return tuple(
        op for op in ops if not names or op.axes is None or names & set(op.axes)
    )
