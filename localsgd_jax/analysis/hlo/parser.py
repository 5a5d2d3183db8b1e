"""Parser of the text of compiled HLO modules."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_ARRAY_TYPE = re.compile(r"\b(pred|bf16|[fsuc]\d+\w*)\[([^\]]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_END = re.compile(r"\}(, execution_thread=.*)?\s*$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED_KEYS = (
    *("calls", "to_apply", "called_computations", "select", "scatter", "condition"),
    *("body", "branch_computations", "true_computation", "false_computation"),
)


class Instruction(NamedTuple):
    """An HLO instruction.

    Attributes:
      name: unique in the module.
      type: type of the result, such as `(f32[8,2]{1,0}, s32[])`.
      opcode: such as `all-reduce`.
      operands: names of the instructions that it reads.
      operand_text: text within the parentheses that follow the opcode.
      attributes: text after these parentheses.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    operand_text: str
    attributes: str

    def called_names(self, key: str) -> tuple[str, ...]:
        """Returns the names of the computations in an attribute, such as `body`."""
        value = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return tuple(re.findall(r"[\w.\-]+", value[1])) if value else ()


# The instructions of a computation by name, in the order of the schedule.
Computation = Mapping[str, Instruction]


class HloModule(NamedTuple):
    """A compiled HLO module.

    Attributes:
      entry: name of the entry computation.
      computations: the computations by name. The order of the instructions in the
        text is the schedule.
      num_devices: number of devices that run the module together.
    """

    entry: str
    computations: Mapping[str, Computation]
    num_devices: int

    def called(self, instruction: Instruction, key: str) -> tuple[Computation, ...]:
        """Returns the computations in an attribute; an undefined one is empty."""
        names = instruction.called_names(key)
        return tuple(self.computations.get(name, {}) for name in names)


def parse(text: str) -> HloModule:
    """Parses the text of a compiled module.

    Args:
      text: result of `compiled.as_text()`.

    Returns:
      The module.

    Raises:
      ValueError: if the text has no entry computation, several modules or lines that
        are no instructions.

    Example:
      >>> module = parse('''HloModule m, num_partitions=2
      ...
      ... ENTRY %main (x: f32[4]) -> f32[4] {
      ...   ROOT %x = f32[4]{0} parameter(0)
      ... }
      ... ''')
      >>> module.entry, module.num_devices, module.computations["main"]["x"].opcode
      ('main', 2, 'parameter')
    """
    num_modules = len(re.findall(r"^HloModule ", text, re.M))
    if num_modules > 1:
        raise ValueError(
            "collective_ops(program): its text must be that of one module, got "
            f"{num_modules}"
        )
    entry, current = None, None
    computations: dict[str, Computation] = {}
    for line in text.splitlines():
        if opening := _COMPUTATION.match(line):
            is_entry, name = opening.groups()
            entry = name if is_entry else entry
            current = name, []
        elif current and _END.match(line):
            computations[current[0]] = _parse_computation(current[1])
            current = None
        elif current and line.strip():
            current[1].append(line)
        elif computations and not current and line.strip():
            raise ValueError(
                f"collective_ops(program): unreadable line of its text {line[:80]!r}"
            )
    if current:
        raise ValueError("collective_ops(program): its text ends in a computation")
    if entry is None:
        raise ValueError("collective_ops(program): its text has no ENTRY computation")
    return HloModule(entry, computations, num_partitions(text))


def num_partitions(text: str) -> int:
    """Returns the number of devices that run a module together.

    Args:
      text: of the compiled module. That of a program for several TPU slices is the
        module of one of them.

    Returns:
      The number in its header.
    """
    header = text.partition("\n")[0]
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
    return math.prod(map(int, counts))


def all_called_names(instruction: Instruction) -> tuple[str, ...]:
    """Returns the names of all computations that an instruction executes."""
    return tuple(name for key in _CALLED_KEYS for name in instruction.called_names(key))


def type_bytes(text: str) -> int:
    """Returns the size of an HLO type in bytes.

    Args:
      text: an array type or a tuple of array types.

    Returns:
      Bytes. Tokens have size 0; elements smaller than a byte are packed.

    Example:
      >>> type_bytes("(f32[8,2]{1,0}, bf16[3], pred[], s4[5])")
      74
    """
    return sum(
        math.ceil(_dtype_bits(dtype) * math.prod(_dimensions(shape)) / 8)
        for dtype, shape in _ARRAY_TYPE.findall(text)
    )


def dtypes(text: str) -> tuple[str, ...]:
    """Returns the distinct element types of an HLO type, such as `("f32", "s32")`."""
    return tuple(dict.fromkeys(dtype for dtype, _ in _ARRAY_TYPE.findall(text)))


def _parse_computation(lines: Sequence[str]) -> Computation:
    """Parses the instructions of a computation; some span several lines."""
    starts = [index for index, line in enumerate(lines) if _INSTRUCTION.match(line)]
    if lines and starts[:1] != [0]:
        raise ValueError(
            f"collective_ops(program): unreadable line of its text {lines[0][:80]!r}"
        )
    instructions = {}
    for begin, end in itertools.pairwise([*starts, len(lines)]):
        text = "\n".join(lines[begin:end])
        start = _INSTRUCTION.match(text)
        if start:
            name = start[1]
            instructions[name] = _parse_instruction(name, text[start.end() :])
    return instructions


def _parse_instruction(name: str, text: str) -> Instruction:
    """Parses the text of an instruction after the equals sign."""
    end = _matching_parenthesis(text, 0) if text.startswith("(") else text.index(" ")
    result_type, text = text[:end], text[end:].lstrip()
    opening = text.index("(")
    closing = _matching_parenthesis(text, opening)
    operand_text = text[opening + 1 : closing - 1]
    return Instruction(
        name=name,
        type=result_type,
        opcode=text[:opening],
        operands=tuple(_NAME.findall(operand_text)),
        operand_text=operand_text,
        attributes=text[closing:],
    )


def _matching_parenthesis(text: str, start: int) -> int:
    """Returns the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(
        f"collective_ops(program): unbalanced parenthesis in {text[:80]!r}"
    )


def _dtype_bits(dtype: str) -> int:
    """Returns the size of an element in bits, such as 8 for f8e4m3fn."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


def _dimensions(shape: str) -> list[int]:
    """Parses dimensions; a bounded dynamic dimension `<=n` counts as n."""
    return [int(size.lstrip("<= ")) for size in shape.split(",") if size.strip()]
