"""Rows of a history as flat scalars, and their form in JSON."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def flat_row(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a row by name.

    Args:
      row: as given to `on_round_end`: numbers, None, and arrays or lists of them, such
        as the columns of `fault_tolerance.train` with an entry for each process.

    Returns:
      The numbers; entry i of a vector has the name `name.i`, None becomes NaN, and
      other values are omitted.

    Example:
      >>> flat_row({"step": 4, "loss": None, "wait_seconds": [0.0, 0.5]})
      {'step': 4.0, 'loss': nan, 'wait_seconds.0': 0.0, 'wait_seconds.1': 0.5}
    """
    flat = {}
    for name, value in row.items():
        if isinstance(value, str | Mapping):
            continue
        values = np.asarray(value, np.float64)
        for index in np.ndindex(values.shape):
            flat[".".join([name, *map(str, index)])] = float(values[index])
    return flat


def json_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of JSON-compatible values; a number that is not finite is None."""
    return {name: _json_value(value) for name, value in row.items()}


def _json_value(value: Any) -> Any:
    """Converts arrays to lists and numbers that are not finite to None."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return [_json_value(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
