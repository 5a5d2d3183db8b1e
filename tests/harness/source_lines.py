"""Source lines of functions, to compare with locations in compiled programs."""

import inspect
from collections.abc import Callable


def line_of(function: Callable, text: str) -> tuple[str | None, int]:
    """Returns the file and the number of the one line of a function with this text."""
    lines, start = inspect.getsourcelines(function)
    (offset,) = (i for i, line in enumerate(lines) if text in line)
    return inspect.getsourcefile(function), start + offset
