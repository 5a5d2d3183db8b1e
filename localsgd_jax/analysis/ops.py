"""Collective ops of compiled programs."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from localsgd_jax.analysis import compilation
from localsgd_jax.analysis.hlo import parser, replica_groups, source_locations
from localsgd_jax.analysis.hlo.trip_counts import trip_count
from localsgd_jax.analysis.ring_bytes import RING_BYTES_FACTOR

# Opcodes that occupy a device. Most others only rename or move data.
COMPUTE_OPCODES = {
    "call",
    "conditional",
    "convolution",
    "custom-call",
    "dot",
    "fusion",
    "reduce",
    "scatter",
    "sort",
    "while",
}


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
      name: such as `all-reduce`; also for the asynchronous form `all-reduce-start`.
      dtypes: element types of the operands, such as `("f32",)`.
      bytes: size of the operands on one device, per execution.
      bytes_sent: bytes that a device sends per execution, by the ring formulas.
      groups: device groups, by position in the mesh.
      axes: mesh axes along which the groups extend; None if no mesh is known.
      control_flow: loops and branches around the op, outermost first.
      overlapped_ops: opcodes that run between start and done of an asynchronous op,
        which may be none; None for a synchronous op.
      stack_frames: source locations, innermost first.
      async_chain_id: identifier that the TPU compiler gives to all pieces of a
        collective that it splits over other work, such as a loop of local steps.
        Empty for other ops. The pieces are merged into one op.
    """

    name: str
    dtypes: tuple[str, ...]
    bytes: int
    bytes_sent: float
    groups: replica_groups.Groups
    axes: tuple[str, ...] | None
    control_flow: ControlFlow = ()
    overlapped_ops: tuple[str, ...] | None = None
    stack_frames: tuple[source_locations.Frame, ...] = ()
    async_chain_id: str = ""

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


def collective_ops(
    program: Any, *args, mesh: Any = None, **kwargs
) -> tuple[CollectiveOp, ...]:
    """Returns the collective ops of a compiled program.

    A device in a group of n, with an operand of b bytes, sends by the ring algorithms

        all-reduce 2(n − 1)/n · b,  all-gather (n − 1) · b,
        reduce-scatter, all-to-all and broadcast (n − 1)/n · b,  permutation b

    The compiled program is what runs: it contains the collectives that the compiler
    inserts for shardings, and no collectives over vmap axes, which stay on a device.

    Args:
      program: a compiled program, or a function, jitted or not. A function is compiled
        for the arguments and not run.
      *args, **kwargs: arguments of the function, or `jax.ShapeDtypeStruct` with
        shardings.
      mesh: the mesh that names the axes; None for the mesh of the arguments.

    Returns:
      The ops in execution order. `analysis.format_table` prints them and
      `analysis.total_bytes_sent` adds them up.

    Raises:
      TypeError: if `program` is neither a function nor a compiled program.
      ValueError: if the mesh is too small for the program.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5),
      ...                            rule=lsgd.average())
      >>> mesh = jax.make_mesh((jax.device_count(),), ("worker",))
      >>> cluster = lsgd.on_mesh(algorithm, mesh)
      >>> collective_ops(cluster.step, cluster.init(0.0), jnp.ones(cluster.num_workers))
      ()
    """
    compiled = compilation.compile_program(program, args, kwargs)
    return parse_collective_ops(
        compiled.as_text(), compilation.axis_sizes(compiled, mesh, (args, kwargs))
    )


def parse_collective_ops(
    text: str, sizes: Mapping[str, int] | None = None
) -> tuple[CollectiveOp, ...]:
    """Returns the collective ops in the text of a compiled program.

    Args:
      text: result of `compiled.as_text()`.
      sizes: sizes of the mesh axes, outermost first; None if no mesh is known.

    Returns:
      The ops in execution order.
    """
    reader = _OpReader(text, sizes)
    return _merge_chains(reader.ops(reader.entry))


def filter_by_axis(
    ops: Iterable[CollectiveOp], axis: str | Sequence[str] | None
) -> tuple[CollectiveOp, ...]:
    """Returns the ops along a mesh axis, including ops with unknown axes.

    Args:
      ops: collective ops.
      axis: one mesh axis, or several of which one must match; None for all.

    Returns:
      The matching ops.
    """
    names = {axis} if isinstance(axis, str) else set(axis or ())
    return tuple(
        op for op in ops if not names or op.axes is None or names & set(op.axes)
    )


class _OpReader:
    """Reader of the collective ops of one module, in execution order."""

    def __init__(self, text: str, sizes: Mapping[str, int] | None) -> None:
        """Parses the module and its stack frames."""
        self._module = parser.parse(text)
        self._sizes = sizes
        self._stacks = source_locations.parse_stack_frames(text)
        self.entry = self._module.computations[self._module.entry]

    def ops(
        self, computation: parser.Computation, control_flow: ControlFlow = ()
    ) -> Iterator[CollectiveOp]:
        """Yields the ops of a computation and of the computations that it calls."""
        schedule = [*computation.values()]
        for index, instruction in enumerate(schedule):
            overlapped = _overlapped_ops(schedule, index)
            if _collective_opcode(instruction):
                op = self._make_op(instruction, computation)
                yield op._replace(control_flow=control_flow, overlapped_ops=overlapped)
            elif instruction.opcode == "while":
                for called, loop in self._loop_parts(instruction, computation):
                    yield from self.ops(called, (*control_flow, loop))
            elif instruction.opcode == "conditional":
                for called, branch in self._branches(instruction):
                    yield from self.ops(called, (*control_flow, branch))
            else:
                for called in self._called(instruction):
                    for op in self.ops(called, control_flow):
                        yield _overlap_with(op, overlapped)

    def _loop_parts(
        self, loop: parser.Instruction, computation: parser.Computation
    ) -> Iterator[tuple[parser.Computation, Loop]]:
        """Yields the condition of a loop, which runs once more, and its body."""
        count = trip_count(self._module, loop, computation)
        (condition,) = self._module.called(loop, "condition")
        (body,) = self._module.called(loop, "body")
        yield condition, Loop(loop.name, None if count is None else count + 1)
        yield body, Loop(loop.name, count)

    def _branches(
        self, conditional: parser.Instruction
    ) -> Iterator[tuple[parser.Computation, Branch]]:
        """Yields the branches of a conditional."""
        called = self._module.called
        branches = called(conditional, "branch_computations") or (
            *called(conditional, "true_computation"),
            *called(conditional, "false_computation"),
        )
        for index, branch in enumerate(branches):
            yield branch, Branch(conditional.name, index, len(branches))

    def _called(self, instruction: parser.Instruction) -> Iterator[parser.Computation]:
        """Yields the computations of a fusion, a call or an asynchronous start."""
        yield from self._module.called(instruction, "calls")
        yield from self._module.called(instruction, "to_apply")

    def _make_op(
        self, instruction: parser.Instruction, computation: parser.Computation
    ) -> CollectiveOp:
        """Returns the op of a collective instruction, without its surroundings."""
        name = _collective_opcode(instruction) or ""
        types = " ".join(computation[operand].type for operand in instruction.operands)
        attributes, sizes = instruction.attributes, self._sizes
        groups = replica_groups.parse_replica_groups(
            attributes, self._module.num_devices
        )
        group_size = max((len(group) for group in groups), default=1)
        operand_bytes = parser.type_bytes(types)
        return CollectiveOp(
            name=name,
            dtypes=parser.dtypes(types),
            bytes=operand_bytes,
            bytes_sent=RING_BYTES_FACTOR[name](group_size) * operand_bytes,
            groups=groups,
            axes=replica_groups.varying_axes(groups, sizes) if sizes else None,
            stack_frames=source_locations.frames_of(attributes, self._stacks),
            async_chain_id=_async_chain_key(instruction),
        )


def _collective_opcode(instruction: parser.Instruction) -> str | None:
    """Returns the collective that an instruction executes or starts, or None."""
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in RING_BYTES_FACTOR else None


def _async_chain_key(instruction: parser.Instruction) -> str:
    """Returns the identifier shared by the pieces of a split collective."""
    chain = re.search(r'\bchain_id="(\w+)"', instruction.attributes)
    channel = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
    return f"{channel[1] if channel else ''}/{chain[1]}" if chain else ""


def _overlapped_ops(
    schedule: Sequence[parser.Instruction], index: int
) -> tuple[str, ...] | None:
    """Returns the opcodes between a start and its done; None for other instructions."""
    start = schedule[index]
    if not start.opcode.endswith("-start") or '"is_sync":true' in start.attributes:
        return None
    in_flight, overlapped = {start.name}, []
    for instruction in schedule[index + 1 :]:
        if in_flight & set(instruction.operands):
            if instruction.opcode.endswith("-done"):
                return tuple(overlapped)
            in_flight.add(instruction.name)
        elif instruction.opcode in COMPUTE_OPCODES or _collective_opcode(instruction):
            overlapped.append(instruction.opcode)
    return tuple(overlapped)


def _overlap_with(op: CollectiveOp, overlapped: tuple[str, ...] | None) -> CollectiveOp:
    """Replaces the overlapped ops if the calling instruction is an async start."""
    return op if overlapped is None else op._replace(overlapped_ops=overlapped)


def _merge_chains(pieces: Iterable[CollectiveOp]) -> tuple[CollectiveOp, ...]:
    """Merges the pieces of each async chain: its start, middle pieces and done."""
    chains: dict[Any, list[CollectiveOp]] = {}
    for number, piece in enumerate(pieces):
        key = (piece.name, piece.async_chain_id) if piece.async_chain_id else number
        chains.setdefault(key, []).append(piece)
    return tuple(_merge_chain(*chain) for chain in chains.values())


def _merge_chain(start: CollectiveOp, *later: CollectiveOp) -> CollectiveOp:
    """Returns the start, overlapped with the ops around the middle pieces."""
    if not later:
        return start
    depth = len(start.control_flow)
    opcodes = (
        "while" if len(piece.control_flow) > depth else "fusion" for piece in later[:-1]
    )
    return start._replace(overlapped_ops=tuple(dict.fromkeys(opcodes)))
