"""Rows of a history as flat scalars, and their form in JSON."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from localsgd_jax.core.validation import check_type, describe


def flat_row(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a row by name.

    Args:
      row: as given to `on_round_end`: numbers, None, and arrays or lists of them, such
        as the columns of `fault_tolerance.train` with an entry for each process.

    Returns:
      The numbers; entry i of a vector has the name `name.i`, None becomes NaN, and
      other values are omitted.

    Raises:
      TypeError: if the row is not a mapping.
      ValueError: if a value is neither text, a mapping nor real numbers of float64.

    Example:
      >>> flat_row({"step": 4, "loss": None, "wait_seconds": [0.0, 0.5]})
      {'step': 4.0, 'loss': nan, 'wait_seconds.0': 0.0, 'wait_seconds.1': 0.5}
    """
    check_type("on_round_end(row)", "row", row, Mapping)
    flat = {}
    for name, value in row.items():
        if isinstance(value, str | Mapping):
            continue
        values = _real_numbers(name, value)
        for index in np.ndindex(values.shape):
            flat[".".join([name, *map(str, index)])] = float(values[index])
    return flat


def json_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of JSON-compatible values; a number that is not finite is None."""
    check_type("on_round_end(row)", "row", row, Mapping)
    return {name: _json_value(name, value) for name, value in row.items()}


def _real_numbers(name: str, value: Any) -> np.ndarray:
    """Returns numbers in float64; raises a ValueError for other values."""
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise _not_real(name, value) from None


def _not_real(name: str, value: Any) -> ValueError:
    """Returns the error for a value that is not a real number."""
    text = f"{name!r} must be a real number of float64, got {describe(value)}"
    return ValueError(f"on_round_end(row): {text}")


def _json_value(name: str, value: Any) -> Any:
    """Converts arrays to lists and numbers that are not finite to None."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return [_json_value(name, x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, complex):
        raise _not_real(name, value)
    return value
