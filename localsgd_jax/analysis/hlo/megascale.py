"""Transfers between TPU slices, which are `send` and `recv` instructions."""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from localsgd_jax.analysis.hlo.parser import Instruction, type_bytes

_COLLECTIVES = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
# Size of the result in a group of n, by size of the operand.
_RESULT_SIZE = {
    "all-reduce": lambda n: 1,
    "all-gather": lambda n: n,
    "reduce-scatter": lambda n: 1 / n,
    "all-to-all": lambda n: 1,
    "collective-permute": lambda n: 1,
}
_HANDLER = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
_TARGET = re.compile(r'_xla_megascale_target=(?:"([^"]*)"|(\{\{.*?\}\}))')
_PRODUCT = re.compile(r"\{([\d,:]+)\}x\{([\d,:]+)\}")
_LISTS = re.compile(r"\{((?:\{\d+(?:,\d+)*\},?)+)\}")
_PAIRS = re.compile(r"\{((?:\{\d+->\d+\},?)+)\}")
# The device `local` of slice `s`, counted from 1, has the id s · 100000 + local.
_IDS_PER_SLICE = 100_000


class Transfer(NamedTuple):
    """A collective across TPU slices.

    Attributes:
      name: such as `all-reduce`.
      id_groups: groups of device ids.
    """

    name: str
    id_groups: tuple[tuple[int, ...], ...]


def is_send(instruction: Instruction) -> bool:
    """Returns whether an instruction sends the operand of a transfer across slices."""
    return instruction.opcode == "send" and _HANDLER in instruction.attributes


def is_recv(instruction: Instruction) -> bool:
    """Returns whether an instruction receives the result of such a transfer."""
    return instruction.opcode == "recv" and _HANDLER in instruction.attributes


def matching_recv(
    send: Instruction, schedule: Iterable[Instruction]
) -> Instruction | None:
    """Returns the `recv` of a `send` in the same computation, or None."""
    matches = (
        other
        for other in schedule
        if is_recv(other) and _rendezvous(other) == _rendezvous(send)
    )
    return next(matches, None)


def matching_send(
    recv: Instruction, schedule: Iterable[Instruction]
) -> Instruction | None:
    """Returns the `send` of a `recv` in the same computation, or None."""
    matches = (
        other
        for other in schedule
        if is_send(other) and _rendezvous(other) == _rendezvous(recv)
    )
    return next(matches, None)


def parse_transfer(
    send: Instruction, recv: Instruction, operand_bytes: int
) -> Transfer:
    """Parses the kind and the device groups of a transfer across slices.

    The target has one of three forms:

        "{1,2}x{0:3}"             slices, counted from 1, times devices of each; devices
                                  with the same number form a group
        {{100000,200000},…}       groups of device ids
        {{100000->200000},…}      pairs of a source and a target

    Args:
      send: the `send` instruction.
      recv: the `recv` instruction of the same transfer.
      operand_bytes: size of what is sent.

    Returns:
      The transfer.

    Raises:
      NotImplementedError: if the kind or the target has another form, or if the size
        of what is received does not fit them.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    target = _TARGET.search(send.attributes)
    name = _COLLECTIVES.get(kind[1]) if kind else None
    if name is None or target is None:
        raise NotImplementedError(f"transfer across slices {kind and kind[1]!r}")
    text = target[1] or target[2]
    groups = _product_groups(text) if name != "all-to-all" else None
    groups = groups or _listed_groups(text)
    is_permutation = name == "collective-permute"
    if groups is None or is_permutation != ("->" in text):
        raise NotImplementedError(f"transfer across slices to {text[:60]!r}")
    size = _RESULT_SIZE[name](len(groups[0])) * operand_bytes
    if _received_bytes(recv) != size:
        raise NotImplementedError(
            f"{name} across slices of {operand_bytes} bytes that receives "
            f"{_received_bytes(recv)}"
        )
    return Transfer(name, groups)


def _product_groups(text: str) -> tuple[tuple[int, ...], ...] | None:
    """Parses slices times devices."""
    match = _PRODUCT.fullmatch(text)
    if match is None:
        return None
    slices, devices = (_numbers(part) for part in match.groups())
    return tuple(
        tuple(one * _IDS_PER_SLICE + device for one in slices) for device in devices
    )


def _listed_groups(text: str) -> tuple[tuple[int, ...], ...] | None:
    """Parses lists of device ids, or pairs of ids."""
    match = _LISTS.fullmatch(text) or _PAIRS.fullmatch(text)
    if match is None:
        return None
    groups = re.findall(r"\{([^}]*)\}", match[1])
    return tuple(tuple(map(int, re.findall(r"\d+", group))) for group in groups)


def _received_bytes(recv: Instruction) -> int:
    """Returns the size of the result, without the context that follows it."""
    context = re.search(r", u32\[\][^,]*, token\[\]\)$", recv.type)
    return type_bytes(recv.type[: context.start()] if context else recv.type)


def _numbers(text: str) -> Sequence[int]:
    """Parses numbers and inclusive ranges, such as `0:3,8`."""
    ranges = ([*map(int, part.split(":"))] for part in text.split(","))
    return [*itertools.chain(*(range(part[0], part[-1] + 1) for part in ranges))]


def _rendezvous(instruction: Instruction) -> str | None:
    """Returns the name by which the two sides of a transfer find each other."""
    match = re.search(
        r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes
    )
    return match[1] if match else None
