"""Ops that run between the start and the completion of a collective."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from localsgd_jax.analysis.collective_op import CollectiveOp
from localsgd_jax.analysis.hlo import megascale
from localsgd_jax.analysis.hlo.local_instructions import collective_opcode
from localsgd_jax.analysis.hlo.parser import Instruction

# Opcodes that occupy a device. Most others only rename or move data, as do the custom
# calls below.
_COMPUTE_OPCODES = {
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

_IDLE_CUSTOM_CALLS = re.compile(
    r'custom_call_target="(?:AllocateBuffer|AssumeGatherIndicesInBound|'
    r'AsyncCollective\w+|ConcatBitcast|SliceId)"'
)


def overlapped_ops(
    schedule: Sequence[Instruction], index: int
) -> tuple[str, ...] | None:
    """Returns the opcodes between the start of an op and its completion.

    A transfer across TPU slices is in flight from its `send` and `recv`, whichever is
    later, to the `recv-done`.

    Args:
      schedule: the instructions of a computation.
      index: position of the instruction that starts the op.

    Returns:
      The opcodes; None for an instruction that starts nothing asynchronous.
    """
    start = schedule[index]
    if megascale.is_send(start):
        recv = megascale.matching_recv(start, schedule)
        if recv is None:
            return ()
        index, start = max(index, schedule.index(recv)), recv
    elif not start.opcode.endswith("-start") or '"is_sync":true' in start.attributes:
        return None
    in_flight, overlapped = {start.name}, []
    for instruction in schedule[index + 1 :]:
        if in_flight & set(instruction.operands):
            if instruction.opcode.endswith("-done"):
                return tuple(overlapped)
            in_flight.add(instruction.name)
        elif _occupies_device(instruction):
            overlapped.append(instruction.opcode)
    return tuple(overlapped)


def _occupies_device(instruction: Instruction) -> bool:
    """Returns whether an instruction computes or communicates."""
    if instruction.opcode == "custom-call":
        return not _IDLE_CUSTOM_CALLS.search(instruction.attributes)
    opcode = instruction.opcode
    return opcode in _COMPUTE_OPCODES or collective_opcode(instruction) is not None


def async_chain_key(instruction: Instruction) -> str:
    """Returns the identifier shared by the pieces of a split collective."""
    chain = re.search(r'\bchain_id="(\w+)"', instruction.attributes)
    channel = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
    return f"{channel[1] if channel else ''}/{chain[1]}" if chain else ""


def merge_chains(pieces: Iterable[CollectiveOp]) -> tuple[CollectiveOp, ...]:
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
