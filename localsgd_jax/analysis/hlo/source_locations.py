"""Source locations of HLO instructions."""

import itertools
import re
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_SITE_PACKAGES = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
_LIBRARY = str(Path(__file__).parents[2])
_COMPILE_FILE = str(Path(__file__).parents[1] / "compilation.py")


class Frame(NamedTuple):
    """A stack frame.

    Attributes:
      file: path of the source file.
      line: line number, counted from 1.
      function: qualified name, empty if the module does not record it.
    """

    file: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        """Returns `file:line (function)`, as compilers and editors print it."""
        function = f" ({self.function})" if self.function else ""
        return f"{_relative_path(self.file)}:{self.line}{function}"


Frames = tuple[Frame, ...]


def parse_stack_frames(text: str) -> Mapping[int, Frames]:
    """Parses the stack-frame tables at the head of a module.

    Args:
      text: of the compiled module.

    Returns:
      The frames of each stack-frame id, innermost first.
    """
    files, functions, locations, stack = (_parse_table(text, name) for name in _TABLES)
    frames = {
        key: Frame(
            _unquoted(files, _integer(row, "file_name_id")),
            _integer(row, "line"),
            _unquoted(functions, _integer(row, "function_name_id")),
        )
        for key, row in locations.items()
    }
    # Some compilers print the id of the parent plus 1, so that 1 means no parent; then
    # frame 1 is printed as its own parent. Others print the id itself.
    shift = 1 if _integer(stack.get(1, ""), "parent_frame_id") == 1 else 0
    stacks: dict[int, Frames] = {}
    for key, row in sorted(stack.items()):
        inner = frames.get(_integer(row, "file_location_id"))
        outer = stacks.get(_integer(row, "parent_frame_id") - shift, ())
        stacks[key] = (inner, *outer) if inner else outer
    return stacks


def frames_of(attributes: str, stacks: Mapping[int, Frames]) -> Frames:
    """Returns the stack frames of an instruction.

    Args:
      attributes: attributes of the instruction.
      stacks: result of `parse_stack_frames`.

    Returns:
      The frames, innermost first; empty for instructions that the compiler added.
    """
    if match := re.search(r"\bstack_frame_id=(\d+)", attributes):
        return stacks.get(int(match[1]), ())
    if match := re.search(r'source_file="([^"]*)" source_line=(\d+)', attributes):
        return (Frame(match[1], int(match[2])),)
    return ()


def user_frame(frames: Sequence[Frame]) -> Frame | None:
    """Returns the innermost frame in user code.

    Frames of installed packages and of this library are skipped, and so are the
    callers of the compilation for analysis.

    Args:
      frames: innermost first.

    Returns:
      The user frame; the innermost frame if none is in user code; None without frames.

    Example:
      >>> print(user_frame([Frame("/home/me/step.py", 7, "step")]))
      /home/me/step.py:7 (step)
    """
    frames_below_compile = [
        *itertools.takewhile(lambda frame: frame.file != _COMPILE_FILE, frames)
    ]
    user_frames = [
        frame
        for frame in frames_below_compile
        if not frame.file.startswith((*_SITE_PACKAGES, _LIBRARY))
    ]
    return next(iter([*user_frames, *frames_below_compile]), None)


def _parse_table(text: str, name: str) -> dict[int, str]:
    """Parses the numbered rows of a table; empty if the module has no such table."""
    match = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.M)
    rows = (line.split(" ", 1) for line in (match[1] if match else "").splitlines())
    return {int(number): row for number, row in rows}


def _integer(row: str, key: str) -> int:
    """Returns an integer of a row; 0 if the row does not contain it."""
    match = re.search(rf"\b{key}=(\d+)", row)
    return int(match[1]) if match else 0


def _unquoted(table: Mapping[int, str], key: int) -> str:
    """Returns a string of a table; empty if the table does not contain it."""
    return table.get(key, "").strip('"')


def _relative_path(file: str) -> str:
    """Returns the path relative to the working directory, if the file is below it."""
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file
