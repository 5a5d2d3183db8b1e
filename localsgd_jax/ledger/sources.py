"""The lines of source that an instruction comes from, by the program's metadata."""

import itertools
import re
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_PACKAGES = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
_OWN = str(Path(__file__).parent.parent)
_COMPILES = str(Path(__file__).parent / "programs.py")


class Frame(NamedTuple):
    """A call.

    Attributes:
      file: path of the source.
      line: counted from 1.
      function: qualified name, empty if the program does not say.
    """

    file: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        """Returns it as compilers and editors write it."""
        within = f" ({self.function})" if self.function else ""
        return f"{_short(self.file)}:{self.line}{within}"


Calls = tuple[Frame, ...]


def frames(text: str) -> Mapping[int, Calls]:
    """Reads the tables of stack frames at the head of a program.

    Args:
      text: of the compiled program.

    Returns:
      For each frame number the calls, innermost first.
    """
    files, functions, places, stack = (_table(text, name) for name in _TABLES)
    located = {
        key: Frame(
            _unquoted(files, _number(row, "file_name_id")),
            _number(row, "line"),
            _unquoted(functions, _number(row, "function_name_id")),
        )
        for key, row in places.items()
    }
    # Parents are printed plus one, 1 for none; a first frame that is not its own
    # parent tells a compiler that prints them as they are.
    shift = 1 if _number(stack.get(1, ""), "parent_frame_id") == 1 else 0
    found: dict[int, Calls] = {}
    for key, row in sorted(stack.items()):
        inner = located.get(_number(row, "file_location_id"))
        outer = found.get(_number(row, "parent_frame_id") - shift, ())
        found[key] = (inner, *outer) if inner else outer
    return found


def calls_of(attributes: str, known: Mapping[int, Calls]) -> Calls:
    """Returns the calls that an instruction comes from, innermost first.

    Args:
      attributes: of the instruction.
      known: the frames of the program.

    Returns:
      The calls; empty if the compiler made the instruction up.
    """
    if match := re.search(r"\bstack_frame_id=(\d+)", attributes):
        return known.get(int(match[1]), ())
    if match := re.search(r'source_file="([^"]*)" source_line=(\d+)', attributes):
        return (Frame(match[1], int(match[2])),)
    return ()


def culprit(calls: Sequence[Frame]) -> Frame | None:
    """Chooses the call to blame: the innermost that belongs to no installed package.

    Who asked for the program to be compiled is not to blame.

    Args:
      calls: innermost first.

    Returns:
      The call, the innermost one if all belong to packages, None if there is none.

    Example:
      >>> print(culprit([Frame("/home/me/step.py", 7, "step")]))
      /home/me/step.py:7 (step)
    """
    asked = [*itertools.takewhile(lambda call: call.file != _COMPILES, calls)]
    users = [call for call in asked if not call.file.startswith((*_PACKAGES, _OWN))]
    return next(iter([*users, *asked]), None)


def _table(text: str, name: str) -> dict[int, str]:
    """Reads the numbered rows of a table; there may be none."""
    match = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.M)
    rows = (line.split(" ", 1) for line in (match[1] if match else "").splitlines())
    return {int(number): row for number, row in rows}


def _number(row: str, key: str) -> int:
    """Reads a number of a row; 0 if it is not there."""
    match = re.search(rf"\b{key}=(\d+)", row)
    return int(match[1]) if match else 0


def _unquoted(table: Mapping[int, str], key: int) -> str:
    """Reads a string of a table; empty if it is not there."""
    return table.get(key, "").strip('"')


def _short(file: str) -> str:
    """Returns a path below the working directory relative to it."""
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file
