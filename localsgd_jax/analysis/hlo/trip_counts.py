"""Trip counts of HLO while loops."""

import math
import re

from localsgd_jax.analysis.hlo.parser import Computation, HloModule, Instruction

_KNOWN_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def trip_count(
    module: HloModule, loop: Instruction, computation: Computation
) -> int | None:
    """Returns the trip count of a while loop, if it is static.

    Some compilers record it as an attribute. Otherwise, a loop that increments a
    counter i from i₀ in steps of s while i < n, with constants i₀, s and n, runs

        ⌈(n − i₀)/s⌉

    times.

    Args:
      module: the module of the loop.
      loop: the `while` instruction.
      computation: the computation that contains the loop.

    Returns:
      The trip count, or None if the module does not determine it.
    """
    if match := _KNOWN_TRIP_COUNT.search(loop.attributes):
        return int(match[1])
    (condition,) = module.called(loop, "condition")
    (body,) = module.called(loop, "body")
    comparison, next_state = _last_instruction(condition), _last_instruction(body)
    if "direction=LT" not in comparison.attributes or next_state.opcode != "tuple":
        return None
    counter, bound = comparison.operands
    index, limit = _state_index(condition, counter), _constant(condition, bound)
    initial_state = computation[loop.operands[0]]
    if index is None or limit is None or initial_state.opcode != "tuple":
        return None
    start = _constant(computation, initial_state.operands[index])
    step = _increment(body, next_state.operands[index], index)
    return math.ceil((limit - start) / step) if step and start is not None else None


def _last_instruction(computation: Computation) -> Instruction:
    """Returns the last instruction of the schedule."""
    return list(computation.values())[-1]


def _skip_copies(computation: Computation, name: str) -> Instruction:
    """Returns the instruction that defines a value, through copies and bitcasts."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast"):
        instruction = computation[instruction.operands[0]]
    return instruction


def _constant(computation: Computation, name: str) -> int | None:
    """Returns the value of an integer constant; None for any other instruction."""
    instruction = _skip_copies(computation, name)
    text = instruction.operand_text
    is_int = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", text)
    return int(text) if is_int else None


def _state_index(computation: Computation, name: str) -> int | None:
    """Returns the index of a value in the loop state; None if it is no element."""
    instruction = _skip_copies(computation, name)
    match = re.search(r"\bindex=(\d+)", instruction.attributes)
    is_element = instruction.opcode == "get-tuple-element"
    return int(match[1]) if is_element and match else None


def _increment(body: Computation, name: str, index: int) -> int | None:
    """Returns the constant positive increment of a loop counter, or None."""
    instruction = _skip_copies(body, name)
    if instruction.opcode != "add":
        return None
    counter, addend = instruction.operands
    if _state_index(body, counter) != index:
        return None
    step = _constant(body, addend)
    return step if step and step > 0 else None
