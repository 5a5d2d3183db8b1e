"""Argument validation: messages name the call, the rule and the offending value."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.core.pytrees import is_traced
from localsgd_jax.core.types import PyTree, SyncRule


def check(holds: object, call: str, rule: str, *values: object) -> None:
    """Raises a ValueError "call: rule, got values" unless a condition holds.

    Args:
      holds: the condition. Comparisons with NaN are false, so write it as the rule
        that must hold and not as its negation.
      call: public call and argument, such as "every(h)".
      rule: requirement, with the name of the argument.
      *values: offending values.
    """
    if not holds:
        raise ValueError(f"{call}: {rule}, got {' and '.join(map(str, values))}")


def check_min(call: str, minimum: float, **values: float) -> None:
    """Raises a ValueError if an argument is below a minimum or NaN.

    Args:
      call: public call without arguments, such as "bound".
      minimum: smallest allowed value.
      **values: arguments by name.
    """
    for name, value in values.items():
        rule = f"{name} must be at least {minimum}"
        check(value >= minimum, f"{call}({name})", rule, value)


def check_int(call: str, name: str, value: int, minimum: int) -> int:
    """Returns an integer argument as a Python int.

    Args:
      call: public call and argument, such as "every(h)".
      name: name of the argument.
      value: its value.
      minimum: smallest allowed value.

    Returns:
      The value.

    Raises:
      TypeError: if the value is a bool or not an integer.
      ValueError: if it is below the minimum.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{call}: {name} must be an int, got {value!r}")
    check(value >= minimum, call, f"{name} must be at least {minimum}", value)
    return int(value)


def check_positive(call: str, name: str, value: float) -> float:
    """Returns a finite, positive argument as a Python float.

    Args:
      call: public call and argument.
      name: name of the argument.
      value: its value.

    Returns:
      The value.

    Raises:
      TypeError: if the value is a bool or not a real number.
      ValueError: if it is not finite or not above 0.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{call}: {name} must be a number, got {value!r}")
    positive = math.isfinite(value) and value > 0
    check(positive, call, f"{name} must be finite and above 0", value)
    return float(value)


def check_unit_interval(call: str, name: str, value: float) -> None:
    """Raises a ValueError if an argument is outside [0, 1] or NaN."""
    check(0 <= value <= 1, call, f"{name} must be in [0, 1]", value)


def check_rule(call: str, rule: SyncRule) -> None:
    """Raises a TypeError unless the argument is a `SyncRule`."""
    if not isinstance(rule, SyncRule):
        raise TypeError(
            f"{call}: a SyncRule is needed, such as average(); got {rule!r}"
        )


def check_worker_axis(
    call: str,
    batch: PyTree,
    workers: int,
    position: int = 0,
    local_workers: int | None = None,
) -> None:
    """Raises a ValueError if a worker axis has the wrong length.

    Args:
      call: public call and argument.
      batch: leaves `(K, ...)`, or `(H, K, ...)` with position 1.
      workers: K.
      position: index of the worker axis, 0 or 1.
      local_workers: number of workers of this process, which is an allowed length,
        too.
    """
    allowed = {workers, workers if local_workers is None else local_workers}
    for path, leaf in jax.tree.leaves_with_path(batch):
        shape = np.shape(leaf)
        if not set(shape[position : position + 1]) & allowed:
            axis = ("leading axis", "second axis")[position]
            expected = f"{workers} workers"
            if len(allowed) > 1:
                expected += f" or the {local_workers} of this process"
            raise ValueError(
                f"{call}: the {axis} of every leaf must be the {expected}, got "
                f"shape {shape} at {jax.tree_util.keystr(path) or 'the root'}"
            )


def check_weights(weights: jax.Array | None, workers: int) -> jax.Array | None:
    """Returns the weights of a synchronisation as a floating point array.

    The elements are checked only if they are concrete, not under a trace.

    Args:
      weights: `(K,)`, or None for equal weights.
      workers: K.

    Returns:
      `(K,)`, or None.

    Raises:
      TypeError: if the weights are not real numbers.
      ValueError: if the shape is not `(K,)`, a weight is negative or not finite, or a
        weight or the sum of all is out of the range of the floating point type.
    """
    if weights is None:
        return None
    concrete = not is_traced(weights)
    values = np.asarray(weights) if concrete else weights
    if values.shape != (workers,):
        raise ValueError(
            f"sync(state, weight): weight must have shape ({workers},), one for each "
            f"worker, got {values.shape}"
        )
    if not jnp.issubdtype(values.dtype, np.number) and values.dtype != bool:
        raise TypeError(
            f"sync(state, weight): weights must be numbers, got dtype {values.dtype}"
        )
    if jnp.issubdtype(values.dtype, np.complexfloating):
        raise TypeError(
            f"sync(state, weight): weights must be real, got dtype {values.dtype}"
        )
    dtype = jnp.result_type(float)
    if concrete:
        _check_weight_range(values, dtype)
    return jnp.asarray(values, dtype)


def _check_weight_range(values: np.ndarray, dtype: np.dtype) -> None:
    """Raises a ValueError unless weights and their sum are numbers of a dtype."""
    call, limits = "sync(state, weight)", np.finfo(dtype)
    values = values.astype(np.float64)

    def check_all(valid: np.ndarray, rule: str) -> None:
        if not valid.all():
            worker = int(valid.argmin())
            check(False, call, rule, f"{values[worker]} for worker {worker}")

    is_finite = np.isfinite(values) & (values >= 0)
    check_all(is_finite, "weights must be finite and not negative")
    in_range = (values == 0) | ((values >= limits.tiny) & (values <= limits.max))
    text = f"positive weights must be in [{limits.tiny}, {limits.max}] as {dtype}"
    check_all(in_range, text)
    with np.errstate(over="ignore"):
        total = values.sum()
    text = f"the sum of the weights must be at most {limits.max} as {dtype}"
    check(total <= limits.max, call, text, total)
