"""Selection of test cases: the default run, and the marker `full`."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def in_full(*values: Any, id: str | None = None) -> Any:
    """Returns a parameter that runs only with `-m "not slow"`."""
    return pytest.param(*values, marks=pytest.mark.full, id=id)


def keep(values: Iterable, fast: Callable[[Any], bool] | Collection) -> list:
    """Marks all values as `full` except for `fast`, a predicate or a collection."""
    is_fast = fast if callable(fast) else fast.__contains__
    return [value if is_fast(value) else in_full(value) for value in values]
