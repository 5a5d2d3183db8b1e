"""How often a loop of a compiled program runs."""

import math
import re
from collections.abc import Mapping, Sequence

from localsgd_jax.ledger import hlo

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def times(
    program: hlo.Program, loop: hlo.Instruction, around: Sequence[hlo.Instruction]
) -> int | None:
    """Returns how often a loop runs, if the program says so.

    Some compilers note it. Otherwise a loop that counts i from i₀ in steps of s while
    i < n, all of them constants, runs

        ⌈(n − i₀)/s⌉ times.

    Args:
      program: that holds the loop.
      loop: the `while`.
      around: the computation in which it stands.

    Returns:
      The number of times, or None.
    """
    if match := _KNOWN.search(loop.attributes):
        return int(match[1])
    parts = [hlo.called(loop, key) for key in ("condition", "body")]
    test, body = (_by_name(program.computations[name]) for (name,) in parts)
    compare, moved = _last(test), _last(body)
    if "direction=LT" not in compare.attributes or moved.opcode != "tuple":
        return None
    left, right = compare.operands
    index, limit = _index(test, left), _constant(test, right)
    initial = _by_name(around)[loop.operands[0]]
    if index is None or limit is None or initial.opcode != "tuple":
        return None
    start = _constant(_by_name(around), initial.operands[index])
    step = _step(body, moved.operands[index], index)
    return math.ceil((limit - start) / step) if step and start is not None else None


def _by_name(lines: Sequence[hlo.Instruction]) -> Mapping[str, hlo.Instruction]:
    """Returns the instructions of a computation by name."""
    return {line.name: line for line in lines}


def _last(lines: Mapping[str, hlo.Instruction]) -> hlo.Instruction:
    """Returns the instruction that ends a schedule."""
    return list(lines.values())[-1]


def _through(lines: Mapping[str, hlo.Instruction], name: str) -> hlo.Instruction:
    """Follows copies to where a value comes from."""
    line = lines[name]
    while line.opcode in ("copy", "bitcast"):
        line = lines[line.operands[0]]
    return line


def _constant(lines: Mapping[str, hlo.Instruction], name: str) -> int | None:
    """Returns an integer constant."""
    line = _through(lines, name)
    known = line.opcode == "constant" and re.fullmatch(r"-?\d+", line.text)
    return int(line.text) if known else None


def _index(lines: Mapping[str, hlo.Instruction], name: str) -> int | None:
    """Returns which part of the loop's state a value is."""
    line = _through(lines, name)
    match = re.search(r"\bindex=(\d+)", line.attributes)
    return int(match[1]) if line.opcode == "get-tuple-element" and match else None


def _step(lines: Mapping[str, hlo.Instruction], name: str, index: int) -> int | None:
    """Returns by how much the body moves the counter, if it is positive."""
    line = _through(lines, name)
    if line.opcode != "add":
        return None
    left, right = line.operands
    if _index(lines, left) != index:
        return None
    step = _constant(lines, right)
    return step if step and step > 0 else None
