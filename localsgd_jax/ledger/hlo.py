"""The text of a compiled program as data: computations, instructions, types."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+\w*)\[([^\]]*)\]")
_OPENING = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
      name: unique in the program.
      type: of the result, such as `(f32[8,2]{1,0}, s32[])`.
      opcode: such as `all-reduce`.
      operands: names of the instructions that it reads.
      text: what stands within the parentheses of the opcode.
      attributes: what follows them.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    attributes: str


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      entry: name of the computation that runs first.
      computations: the instructions of each computation, in the order of the text,
        which is the schedule.
      devices: how many devices run it together.
    """

    entry: str
    computations: Mapping[str, tuple[Instruction, ...]]
    devices: int


def parse(text: str) -> Program:
    """Reads the text of a compiled program.

    Args:
      text: as `compiled.as_text()` gives it.

    Returns:
      The program.

    Raises:
      ValueError: if it has no entry computation.

    Example:
      >>> program = parse('''HloModule m, num_partitions=2
      ...
      ... ENTRY %main (x: f32[4]) -> f32[4] {
      ...   ROOT %x = f32[4]{0} parameter(0)
      ... }
      ... ''')
      >>> program.entry, program.devices, program.computations["main"][0].opcode
      ('main', 2, 'parameter')
    """
    entry, name, found = None, None, {}
    for line in text.splitlines():
        if opening := _OPENING.match(line):
            name = opening[2]
            entry = name if opening[1] else entry
            found[name] = []
        elif name and (start := _INSTRUCTION.match(line)):
            found[name].append(_instruction(start[1], line[start.end() :]))
    if entry is None:
        raise ValueError("ledger(program): its text has no ENTRY computation")
    header = text.partition("\n")[0]
    devices = math.prod(
        int(count)
        for count in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
    )
    computations = {name: tuple(lines) for name, lines in found.items()}
    return Program(entry, computations, devices)


def size(text: str) -> int:
    """Returns the bytes of a type.

    Args:
      text: of the type, an array or a tuple of arrays.

    Returns:
      Bytes; tokens count nothing, elements below a byte are packed.

    Example:
      >>> size("(f32[8,2]{1,0}, bf16[3], pred[], s4[5])")
      74
    """
    return sum(
        math.ceil(_bits(kind) * math.prod(_dimensions(shape)) / 8)
        for kind, shape in _ARRAY.findall(text)
    )


def dtypes(text: str) -> tuple[str, ...]:
    """Returns the element types in a type, each once, such as `("f32", "s32")`."""
    return tuple(dict.fromkeys(kind for kind, _ in _ARRAY.findall(text)))


def called(instruction: Instruction, key: str) -> tuple[str, ...]:
    """Returns the computations that an attribute names, such as `body`.

    Args:
      instruction: that calls them.
      key: the attribute.

    Returns:
      Their names, in order.
    """
    match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes)
    return tuple(re.findall(r"[\w.\-]+", match[1])) if match else ()


def _instruction(name: str, rest: str) -> Instruction:
    """Splits what follows the equals sign."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inner = rest[opening + 1 : closing - 1]
    return Instruction(
        name, kind, rest[:opening], tuple(_NAME.findall(inner)), inner, rest[closing:]
    )


def _closing(text: str, start: int) -> int:
    """Returns the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"ledger(program): a parenthesis stays open in {text[:80]!r}")


def _bits(kind: str) -> int:
    """Returns the bits of an element, such as 8 for f8e4m3fn."""
    digits = re.search(r"\d+", kind)
    return int(digits[0]) if digits else 8


def _dimensions(shape: str) -> list[int]:
    """Reads dimensions; one that may be smaller at run time counts in full."""
    return [int(size.lstrip("<= ")) for size in shape.split(",") if size.strip()]
