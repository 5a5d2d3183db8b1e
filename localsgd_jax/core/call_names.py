"""Names of calls: text that identifies a rule in every process and every run."""

import contextlib
import dis
import functools
import hashlib
import inspect
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_MAX_CHARS = 300
# Their code may differ between versions; the numbers that they capture are compared.
_LIBRARIES = ("jax", "optax", "flax", "chex", "localsgd_jax")


def call_name(function: str, *arguments: object, **keywords: object) -> str:
    """Formats a call with its arguments.

    The text is the same in every process: it holds no addresses.

    Args:
      function: name of the function.
      *arguments: positional arguments, such as a rule or a schedule.
      **keywords: keyword arguments; an argument that is None is omitted.

    Returns:
      One line.

    Example:
      >>> call_name("average", axis=None), call_name("average", axis="pod")
      ('average()', "average(axis='pod')")
    """
    parts = [value_name(value) for value in arguments]
    parts += [
        f"{name}={value_name(value)}"
        for name, value in keywords.items()
        if value is not None
    ]
    return f"{function}({', '.join(parts)})"


def value_name(value: object) -> str:
    """Formats an argument of a call.

    Rules and schedules are shown as the calls that made them, functions as their
    qualified names with the numbers and strings that they capture: in closures, default
    values and `functools.partial`, and in the code of functions of the user. A function
    defined inside another, and an optax optimizer, which consists of such functions, is
    shown as the outermost function that defines it. Names of global variables and calls
    in a function are not known.

    Args:
      value: an argument.

    Returns:
      One line.

    Example:
      >>> import optax
      >>> value_name(0.5), value_name(len), value_name(optax.sgd(0.1, momentum=0.9))
      ('0.5', 'len', 'chain(decay=0.9, nesterov=False, step_size=-0.1)')
    """
    if hasattr(value, "init"):
        value = getattr(value, "update", value)
    if name := function_name(value):
        items = [f"{key}={text}" for key, text in _captured(value, set())]
        return _shorten(f"{name}({', '.join(items)})" if items else name)
    if isinstance(value, Tracer):
        return "traced"
    if isinstance(value, np.generic | jax.Array) and value.ndim == 0:
        value = value.item()
    return " ".join(_ADDRESS.sub("", repr(value)).split())


def function_name(value: object) -> str:
    """Returns the name of the outermost function that defines a function.

    Args:
      value: a function, perhaps with `functools.partial`.

    Returns:
      The qualified name; "" for objects that are no functions.
    """
    while isinstance(value, functools.partial):
        value = value.func
    return getattr(value, "__qualname__", "").split(".<locals>")[0]


def _captured(value: Any, seen: set[int], name: str = "") -> Iterator[tuple[str, str]]:
    """Yields the names and texts of all numbers and strings in a function."""
    if value is None or id(value) in seen:
        return
    if isinstance(value, functools.partial):
        yield from _captured(value.func, seen, name)
        yield from _captured(value.args, seen, name or "args")
        yield from _captured(value.keywords, seen, name)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _captured(value[key], seen, str(key))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _captured(item, seen, name)
    elif inspect.isfunction(value):
        seen.add(id(value))
        # A cell of a variable that is not assigned yet is empty.
        cells = {}
        for key, cell in zip(
            value.__code__.co_freevars, value.__closure__ or (), strict=True
        ):
            with contextlib.suppress(ValueError):
                cells[key] = cell.cell_contents
        yield from _captured(cells, seen)
        yield from _captured(value.__defaults__, seen, "default")
        yield from _captured(value.__kwdefaults__, seen)
        if not (value.__module__ or "").startswith(_LIBRARIES):
            yield from (("code", text) for text in _code_values(value.__code__))
    elif (
        isinstance(value, np.ndarray | jax.Array)
        and value.ndim
        and not isinstance(value, Tracer)
    ):
        yield name, _array_text(value)
    elif isinstance(value, bool | int | float | complex | str | np.generic | jax.Array):
        yield name, value_name(value)
    elif isinstance(vars(type(value)).get("__repr__"), types.FunctionType):
        yield name, value_name(value)


def _code_values(code: types.CodeType) -> Iterator[str]:
    """Yields constants and comparisons of a function, equal in all Python versions."""
    for step in dis.get_instructions(code):
        if step.opname in ("COMPARE_OP", "BINARY_OP"):
            yield step.argrepr.removeprefix("bool(").removesuffix(")")
        elif isinstance(step.argval, types.CodeType):
            yield from _code_values(step.argval)
        elif "CONST" in step.opname or step.opname == "LOAD_SMALL_INT":
            if isinstance(step.argval, bool | int | float | complex):
                yield repr(step.argval)


def _array_text(value: Any) -> str:
    """Returns dtype, shape and a digest of an array; no digest if it is traced."""
    text = f"{value.dtype}{list(value.shape)}"
    if isinstance(value, Tracer) or not getattr(value, "is_fully_addressable", True):
        return text
    digest = hashlib.sha256(np.asarray(value).tobytes()).hexdigest()[:8]
    return f"{text} {digest}"


def _shorten(text: str) -> str:
    """Replaces the end of a long text by a digest of all of it."""
    if len(text) <= _MAX_CHARS:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text[:_MAX_CHARS]}… (sha256 {digest})"
