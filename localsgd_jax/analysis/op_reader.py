"""Reader of the collective ops of a compiled module."""

import math
from collections.abc import Iterator

from localsgd_jax.analysis.async_ops import async_chain_key, overlapped_ops
from localsgd_jax.analysis.collective_op import (
    NOT_UNDERSTOOD,
    Branch,
    CollectiveOp,
    ControlFlow,
    Loop,
)
from localsgd_jax.analysis.device_layout import (
    DeviceLayout,
    Groups,
    global_groups,
    position_groups,
)
from localsgd_jax.analysis.hlo import (
    megascale,
    parser,
    replica_groups,
    source_locations,
)
from localsgd_jax.analysis.hlo.local_instructions import (
    collective_opcode,
    describe_unknown,
)
from localsgd_jax.analysis.hlo.trip_counts import trip_count
from localsgd_jax.analysis.ring_bytes import sent_bytes

# Attributes whose computations run whenever the instruction does.
_CALLING_ATTRIBUTES = ("calls", "to_apply", "called_computations")

# The TPU compiler emits a fusion of an all-reduce and a slice as a reduce-scatter.
_REDUCE_SCATTER_FUSION = "all-reduce-scatter"


class OpReader:
    """Reader of the collective ops of one module, in execution order.

    An instruction that may leave its device and is not understood becomes an op, too.
    """

    def __init__(self, text: str, layout: DeviceLayout | None) -> None:
        """Parses the module and its stack frames."""
        self._module = parser.parse(text)
        self._layout = layout
        self._stacks = source_locations.parse_stack_frames(text)
        self._visited: set[str] = set()

    def all_ops(self) -> Iterator[CollectiveOp]:
        """Yields the ops of the entry computation and of all that it calls."""
        yield from self._ops(self._module.entry, ())
        for name, computation in self._module.computations.items():
            if name in self._visited:
                continue
            for instruction in computation.values():
                problem = self._problem(instruction) or collective_opcode(instruction)
                if problem:
                    problem = f"{problem} in a computation without a caller"
                    yield self._unknown_op(instruction, computation, problem)

    def _ops(self, name: str, control_flow: ControlFlow) -> Iterator[CollectiveOp]:
        """Yields the ops of a computation and of the computations that it calls."""
        self._visited.add(name)
        computation = self._module.computations[name]
        schedule = [*computation.values()]
        for index, instruction in enumerate(schedule):
            overlapped = overlapped_ops(schedule, index)
            if op := self._read(instruction, computation):
                if name.startswith(_REDUCE_SCATTER_FUSION):
                    op = _as_reduce_scatter(op)
                yield op._replace(control_flow=control_flow, overlapped_ops=overlapped)
                continue
            for called, scope in self._called(instruction, computation):
                for op in self._ops(called, (*control_flow, *scope)):
                    yield _overlap_with(op, overlapped)

    def _called(
        self, instruction: parser.Instruction, computation: parser.Computation
    ) -> Iterator[tuple[str, ControlFlow]]:
        """Yields the called computations with the loop or branch around them."""
        if instruction.opcode == "while":
            yield from self._loop_parts(instruction, computation)
        elif instruction.opcode == "conditional":
            yield from _branches(instruction)
        else:
            for key in _CALLING_ATTRIBUTES:
                for name in instruction.called_names(key):
                    yield name, ()

    def _loop_parts(
        self, loop: parser.Instruction, computation: parser.Computation
    ) -> Iterator[tuple[str, ControlFlow]]:
        """Yields the condition of a loop, which runs once more, and its body."""
        count = trip_count(self._module, loop, computation)
        (condition,) = loop.called_names("condition")
        (body,) = loop.called_names("body")
        yield condition, (Loop(loop.name, None if count is None else count + 1),)
        yield body, (Loop(loop.name, count),)

    def _read(
        self, instruction: parser.Instruction, computation: parser.Computation
    ) -> CollectiveOp | None:
        """Returns the op of an instruction, without its surroundings, or None."""
        try:
            if name := collective_opcode(instruction):
                return self._collective(name, instruction, computation)
            if megascale.is_send(instruction):
                return self._transfer(instruction, computation)
        except NotImplementedError as error:
            return self._unknown_op(instruction, computation, str(error))
        if megascale.is_recv(instruction) and megascale.matching_send(
            instruction, computation.values()
        ):
            return None
        problem = self._problem(instruction)
        return self._unknown_op(instruction, computation, problem) if problem else None

    def _problem(self, instruction: parser.Instruction) -> str | None:
        """Returns why an instruction may leave the device unseen, or None."""
        called = parser.all_called_names(instruction)
        for name in called:
            if name not in self._module.computations:
                return f"{instruction.opcode} of an unknown computation"
        return describe_unknown(instruction)

    def _collective(
        self,
        name: str,
        instruction: parser.Instruction,
        computation: parser.Computation,
    ) -> CollectiveOp:
        """Returns the op of a collective within the devices of a module."""
        num_devices = self._module.num_devices
        try:
            groups = replica_groups.parse_replica_groups(
                instruction.attributes, num_devices
            )
        except NotImplementedError as error:
            raise NotImplementedError(f"{name} with {error}") from None
        if self._layout:
            groups = global_groups(groups, self._layout, num_devices)
        return self._make_op(name, groups, instruction, computation)

    def _transfer(
        self, send: parser.Instruction, computation: parser.Computation
    ) -> CollectiveOp:
        """Returns the op of a transfer across slices."""
        recv = megascale.matching_recv(send, computation.values())
        if recv is None:
            raise NotImplementedError("send across slices without a recv")
        operand_bytes = parser.type_bytes(_operand_types(send, computation))
        transfer = megascale.parse_transfer(send, recv, operand_bytes)
        if self._layout is None or not self._layout.device_ids:
            raise NotImplementedError(f"{transfer.name} across slices without a mesh")
        groups = position_groups(transfer.id_groups, self._layout)
        op = self._make_op(transfer.name, groups, send, computation)
        frames = op.stack_frames or self._nearest_frames(recv, computation)
        return op._replace(stack_frames=frames)

    def _make_op(
        self,
        name: str,
        groups: Groups,
        instruction: parser.Instruction,
        computation: parser.Computation,
    ) -> CollectiveOp:
        """Returns an op that is understood."""
        types = _operand_types(instruction, computation)
        operand_bytes, layout = parser.type_bytes(types), self._layout
        axes = replica_groups.varying_axes(groups, layout.sizes) if layout else None
        slices = layout.slices if layout else ()
        sent, across = sent_bytes(name, operand_bytes, groups, slices)
        return CollectiveOp(
            name=name,
            dtypes=parser.dtypes(types),
            bytes=operand_bytes,
            bytes_sent=sent,
            groups=groups,
            axes=axes,
            stack_frames=self._frames(instruction),
            async_chain_id=async_chain_key(instruction),
            dcn_bytes_sent=across,
        )

    def _unknown_op(
        self,
        instruction: parser.Instruction,
        computation: parser.Computation,
        problem: str,
    ) -> CollectiveOp:
        """Returns an op that is not understood."""
        types = _operand_types(instruction, computation)
        return CollectiveOp(
            name=NOT_UNDERSTOOD,
            dtypes=parser.dtypes(types),
            bytes=parser.type_bytes(types),
            bytes_sent=math.inf,
            groups=(),
            axes=None,
            stack_frames=self._frames(instruction),
            dcn_bytes_sent=math.inf,
            problem=problem,
        )

    def _frames(self, instruction: parser.Instruction) -> source_locations.Frames:
        """Returns the stack frames of an instruction."""
        return source_locations.frames_of(instruction.attributes, self._stacks)

    def _nearest_frames(
        self, recv: parser.Instruction, computation: parser.Computation
    ) -> source_locations.Frames:
        """Returns the frames of the next instruction that uses a received value."""
        derived = {recv.name}
        for instruction in computation.values():
            if derived & set(instruction.operands):
                if frames := self._frames(instruction):
                    return frames
                derived.add(instruction.name)
        return ()


def _branches(
    conditional: parser.Instruction,
) -> Iterator[tuple[str, ControlFlow]]:
    """Yields the branches of a conditional."""
    branches = conditional.called_names("branch_computations") or (
        *conditional.called_names("true_computation"),
        *conditional.called_names("false_computation"),
    )
    for index, branch in enumerate(branches):
        yield branch, (Branch(conditional.name, index, len(branches)),)


def _operand_types(
    instruction: parser.Instruction, computation: parser.Computation
) -> str:
    """Returns the types of the operands."""
    operands = (computation.get(operand) for operand in instruction.operands)
    return " ".join(operand.type for operand in operands if operand)


def _as_reduce_scatter(op: CollectiveOp) -> CollectiveOp:
    """Returns an all-reduce as a reduce-scatter, which sends half as much."""
    if op.name != "all-reduce":
        return op
    return op._replace(
        name="reduce-scatter",
        bytes_sent=op.bytes_sent / 2,
        dcn_bytes_sent=op.dcn_bytes_sent / 2,
    )


def _overlap_with(op: CollectiveOp, overlapped: tuple[str, ...] | None) -> CollectiveOp:
    """Replaces the overlapped ops if the calling instruction is an async start."""
    return op if overlapped is None else op._replace(overlapped_ops=overlapped)
