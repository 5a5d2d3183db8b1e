"""Validation of predicates on the number of local steps or rounds."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from localsgd_jax.core.pytrees import is_traced

_NUM_PROBED = 32


def check_bool(call: str, value: Any) -> Any:
    """Returns the result of a predicate.

    Args:
      call: public call and argument, such as "train(schedule)".
      value: the result, perhaps traced.

    Returns:
      The value.

    Raises:
      TypeError: unless it is a bool or a scalar boolean array.
    """
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    is_scalar = is_array and value.shape == () and value.dtype == bool
    if not (isinstance(value, bool) or is_scalar):
        raise TypeError(
            f"{call}: it must return a bool or a scalar boolean array, got {value!r}"
        )
    return value


def checked_predicate(call: str, predicate: Callable) -> Callable:
    """Wraps a predicate on Python ints with checks of its results.

    Args:
      call: public call and argument.
      predicate: `predicate(number) -> bool`.

    Returns:
      `checked(number) -> bool`. It raises a TypeError unless the result is a bool, and
      a ValueError if two calls with the same number have different results.
    """

    def checked(number: int) -> bool:
        result = check_bool(call, predicate(number))
        if is_traced(result):  # By a number that it captures.
            return result
        first = bool(result)
        if first != bool(predicate(number)):
            raise ValueError(
                f"{call}: it must return the same for the same number, got True and "
                f"False for {number}"
            )
        return first

    return checked


def probe_predicate(call: str, predicate: Callable) -> None:
    """Calls a predicate with the first numbers and checks the results.

    For predicates that are traced later, where a result that does not depend on the
    number cannot be told from a random one.

    Args:
      call: public call and argument.
      predicate: `predicate(number) -> bool`, for Python ints.

    Raises:
      TypeError: if a result is no bool.
      ValueError: if two calls with the same number have different results.
    """
    checked = checked_predicate(call, predicate)
    with jax.ensure_compile_time_eval():
        for number in range(1, _NUM_PROBED + 1):
            checked(number)
