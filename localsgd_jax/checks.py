"""What is refused, in the words of the call that was made."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from localsgd_jax.base import PyTree


def integer(call: str, name: str, value: int, least: int) -> int:
    """Returns the value as an int; refuses another type or one that is too small."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{call}: {name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{call}: {name} must be at least {least}, got {value}")
    return int(value)


def positive(call: str, name: str, value: float) -> float:
    """Returns the value as a float; refuses what is not finite and above 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{call}: {name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{call}: {name} must be finite and above 0, got {value}")
    return float(value)


def leading(
    call: str, batch: PyTree, workers: int, position: int = 0, own: int | None = None
) -> None:
    """Refuses a batch whose worker axis does not have length K, or that of a part."""
    allowed = (workers, workers if own is None else own)
    for path, leaf in jax.tree.leaves_with_path(batch):
        shape = np.shape(leaf)
        if not set(shape[position : position + 1]) & set(allowed):
            where = ("leading axis", "second axis")[position]
            known = f"{workers} workers"
            if allowed[1] != workers:
                known += f" or the {own} of this process"
            raise ValueError(
                f"{call}: the {where} of every leaf must be the {known}, got "
                f"shape {shape} at {jax.tree_util.keystr(path) or 'the root'}"
            )


def weight(values: jax.Array | None, workers: int) -> jax.Array | None:
    """Refuses weights of another shape and, where they are known, impossible ones."""
    if values is None:
        return None
    known = not isinstance(values, Tracer)
    values = np.asarray(values) if known else values
    if values.shape != (workers,):
        raise ValueError(
            f"sync(state, weight): weight must have shape ({workers},), one for each "
            f"worker, got {values.shape}"
        )
    if known and (bad := ~(np.isfinite(values) & (values >= 0))).any():
        raise ValueError(
            "sync(state, weight): weights must be finite and not negative, got "
            f"{values[bad][0]} for worker {int(bad.argmax())}"
        )
    return jnp.asarray(values, jnp.result_type(float))
