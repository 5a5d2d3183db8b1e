"""Names for rules, as they were called: what a checkpoint remembers of them."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial

from localsgd_jax.base import SyncRule
from localsgd_jax.schedules import Schedule

_LIBRARY = "localsgd_jax."
_PLAIN = (str, int, float, type(None), Schedule)


def describe(rule: SyncRule | Callable) -> str:
    """Returns the call that made a rule, with the arguments that it still knows.

    Rules within rules, schedules, numbers, names and functions of this library are
    arguments; optimizers, other functions and arrays are not, so two rules that differ
    only in an outer learning rate have the same name.

    Args:
      rule: a rule, or a function that holds rules, such as an algorithm's `sync`.

    Returns:
      One line.

    Example:
      >>> import localsgd_jax as lsgd
      >>> describe(lsgd.when(lsgd.every(4), lsgd.average("pod")))
      "when(rule=average(axis='pod'), schedule=every(4))"
    """
    function = rule.apply if isinstance(rule, SyncRule) else rule
    arguments = [
        f"{name}={text}"
        for name, value in sorted(_known(function).items())
        if (text := _describe_argument(value)) is not None
    ]
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__qualname__", type(function).__name__)
    maker = name.split(".<locals>")[0].rsplit(".")[-1]
    return f"{maker}({', '.join(arguments)})"


def _known(function: Callable) -> dict[str, object]:
    """Returns the values that a function was made with, by name."""
    if isinstance(function, partial):
        given = {f"{i}": value for i, value in enumerate(function.args)}
        return _known(function.func) | given | function.keywords
    if not inspect.isfunction(function):
        return {}
    return dict(inspect.getclosurevars(function).nonlocals)


def _describe_argument(value: object) -> str | None:
    """Describes what a rule was made from; None for what has no short name."""
    if isinstance(value, SyncRule):
        return describe(value)
    if isinstance(value, _PLAIN):
        return repr(value)
    if inspect.isfunction(value) and value.__module__.startswith(_LIBRARY):
        return describe(value)
    if isinstance(value, Mapping):
        parts = {name: _describe_argument(part) for name, part in value.items()}
        return str(sorted(f"{name}: {text}" for name, text in parts.items() if text))
    if isinstance(value, list | tuple):
        parts = [text for part in value if (text := _describe_argument(part))]
        return f"[{', '.join(parts)}]" if parts else None
    return None
