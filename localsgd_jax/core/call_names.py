"""Names of calls: text that identifies a rule in every process and every run."""

import functools
import re

import jax
import numpy as np

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


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
    qualified names. A function defined inside another, and an optax optimizer, which
    consists of such functions, is shown as the outermost function that defines it; its
    numbers are not known.

    Args:
      value: an argument.

    Returns:
      One line.

    Example:
      >>> import optax
      >>> value_name(0.5), value_name(len), value_name(optax.scale_by_adam(b1=0.8))
      ('0.5', 'len', 'scale_by_adam')
    """
    if hasattr(value, "init"):
        value = getattr(value, "update", value)
    while isinstance(value, functools.partial):
        value = value.func
    if name := getattr(value, "__qualname__", None):
        return name.split(".<locals>")[0]
    if isinstance(value, np.generic | jax.Array) and value.ndim == 0:
        value = value.item()
    return " ".join(_ADDRESS.sub("", repr(value)).split())
