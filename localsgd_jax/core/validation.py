"""Argument validation: messages name the call, the rule and the offending value."""

import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.core.pytrees import is_traced
from localsgd_jax.core.types import PyTree, State, SyncRule

MAX_INT32, MAX_INT64 = 2**31 - 1, 2**63 - 1
# Far from the limits of float32, which products and sums must not reach.
_MIN_WEIGHT, _MAX_WEIGHT = 1e-20, 1e20

_MAX_TEXT = 100
_REPR = reprlib.Repr()
_REPR.maxother = _REPR.maxstring = _MAX_TEXT
_TYPE_NAMES = {
    Callable: "callable",
    Iterable: "an iterable",
    Mapping: "a mapping",
    Sequence: "a sequence",
    type(None): "None",
    str: "a string",
}


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


def check_int(
    call: str, name: str, value: object, minimum: int, maximum: int = MAX_INT32
) -> int:
    """Returns an integer argument as a Python int.

    Args:
      call: public call and argument, such as "every(h)".
      name: name of the argument.
      value: its value: an int, or an integer array without axes.
      minimum: smallest allowed value.
      maximum: largest allowed value; larger ints overflow in compiled programs.

    Returns:
      The value.

    Raises:
      TypeError: if the value is a bool or not an integer.
      ValueError: if it is out of range.
    """
    is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (is_int or _is_scalar_array(value, jnp.integer)):
        raise TypeError(f"{call}: {name} must be an int, got {describe(value)}")
    number = int(cast(Any, value))
    check(number >= minimum, call, f"{name} must be at least {minimum}", number)
    check(number <= maximum, call, f"{name} must be at most {maximum}", number)
    return number


def check_number(
    call: str,
    name: str,
    value: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Returns a finite real argument that is in a range.

    A traced scalar is returned as it is, because its value is not known.

    Args:
      call: public call and argument, such as "ema(decay)".
      name: name of the argument.
      value: its value: an int, a float, or a real array without axes.
      at_least, above: lower bound, inclusive or exclusive; None for no bound.
      at_most, below: upper bound, inclusive or exclusive; None for no bound.

    Returns:
      The value; a Python float for an array.

    Raises:
      TypeError: if the value is a bool or not a real number.
      ValueError: if it is not finite or out of range.

    Example:
      >>> check_number("ema(decay)", "decay", 0.5, at_least=0, below=1)
      0.5
    """
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    is_array = _is_scalar_array(value, jnp.floating, jnp.integer)
    if not (is_real or is_array):
        raise TypeError(f"{call}: {name} must be a real number, got {describe(value)}")
    if is_traced(value):
        return value
    number = value if isinstance(value, int | float) else float(cast(Any, value))
    rule = _range_text(at_least, above, at_most, below)
    check(not _is_infinite(number), call, f"{name} must be finite", number)
    in_range = (
        number == number
        and (at_least is None or number >= at_least)
        and (above is None or number > above)
        and (at_most is None or number <= at_most)
        and (below is None or number < below)
    )
    check(in_range, call, f"{name} must be {rule}", number)
    return number


def check_type(call: str, name: str, value: object, *types: Any) -> None:
    """Raises a TypeError unless an argument has one of the types.

    Args:
      call: public call and argument, such as "round_time(link)".
      name: name of the argument.
      value: its value.
      *types: classes, `collections.abc.Callable`, `Iterable`, `Mapping` or `Sequence`.
        A string is neither an iterable nor a sequence.

    Example:
      >>> check_type("when(schedule)", "schedule", print, Callable)
    """
    is_text = isinstance(value, str | bytes)
    allowed = [t for t in types if not (is_text and t in (Iterable, Sequence))]
    if not isinstance(value, tuple(allowed)):
        names = " or ".join(_TYPE_NAMES.get(t) or _with_article(t) for t in types)
        raise TypeError(f"{call}: {name} must be {names}, got {describe(value)}")


def check_choice(call: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Raises a ValueError unless an argument is one of some strings."""
    names = " or ".join(f'"{choice}"' for choice in choices)
    is_choice = isinstance(value, str) and value in choices
    check(is_choice, call, f"{name} must be {names}", describe(value))


def check_dtype(call: str, name: str, value: Any) -> np.dtype:
    """Returns a dtype; raises a TypeError for anything else, also for None."""
    try:
        if value is None:
            raise TypeError
        return jnp.dtype(value)
    except (TypeError, ValueError):
        text = f"{name} must be a dtype, got {describe(value)}"
        raise TypeError(f"{call}: {text}") from None


def check_names(call: str, name: str, value: Any) -> tuple[str, ...]:
    """Returns one name or several, such as of mesh axes, as a tuple.

    Args:
      call: public call and argument, such as "average(axis)".
      name: name of the argument.
      value: its value: a string, or a sequence of strings.

    Returns:
      The names.

    Raises:
      TypeError: if the value is neither.
      ValueError: if there are no names, or one is empty.
    """
    names = (value,) if isinstance(value, str) else value
    rule = f"{name} must be a name or several names"
    is_sequence = isinstance(names, Sequence) and not isinstance(names, str | bytes)
    if not is_sequence or not all(isinstance(x, str) for x in names):
        raise TypeError(f"{call}: {rule}, got {describe(value)}")
    check(names and all(names), call, f"{rule}, none empty", describe(value))
    return tuple(names)


def check_rule(call: str, rule: SyncRule) -> None:
    """Raises a TypeError unless the argument is a `SyncRule`."""
    if not isinstance(rule, SyncRule):
        raise TypeError(
            f"{call}: a SyncRule is needed, such as average(); got {describe(rule)}"
        )


def check_rules(call: str, rule: Any) -> None:
    """Raises a TypeError unless the argument is a rule, rules by field, or None."""
    if rule is None:
        return
    rules = rule if isinstance(rule, Mapping) else {"params": rule}
    for field, field_rule in rules.items():
        check_names(call, "a field", field)
        check_rule(f"{call}: rule for the field {field!r}", field_rule)


def check_optimizer(call: str, optimizer: object) -> None:
    """Raises a TypeError unless the argument has the functions of an optimizer."""
    functions = (getattr(optimizer, name, None) for name in ("init", "update"))
    if isinstance(optimizer, type) or not all(map(callable, functions)):
        raise TypeError(
            f"{call}: an optax optimizer is needed, such as optax.sgd(0.1); got "
            f"{describe(optimizer)}"
        )


def check_state(call: str, state: object, kind: type = State) -> None:
    """Raises unless the argument is a state with live buffers.

    Args:
      call: public call and argument, such as "train(state)".
      state: the argument.
      kind: `State`, or the type of another state.

    Raises:
      TypeError: if it is not a state.
      ValueError: if an array of it has been donated.
    """
    check_type(call, "state", state, kind)
    check_not_donated(call, "state", state)


def check_not_donated(call: str, name: str, tree: PyTree) -> None:
    """Raises a ValueError if the buffer of a leaf was donated."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        is_array = isinstance(leaf, jax.Array) and not is_traced(leaf)
        if is_array and leaf.is_deleted():
            raise ValueError(
                f"{call}: {name} must not be donated, got a deleted leaf "
                f"{jax.tree_util.keystr(path) or 'at the root'}; use the {name} that "
                "the call returned"
            )


def check_array_leaves(call: str, name: str, tree: PyTree) -> None:
    """Raises a TypeError if a leaf is not an array of numbers, bools or keys."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not (jnp.issubdtype(dtype, jax.dtypes.extended) or _is_numeric(dtype)):
            raise TypeError(
                f"{call}: every leaf of {name} must be an array of numbers, got "
                f"{describe(leaf)} at {jax.tree_util.keystr(path) or 'the root'}"
            )


def describe(value: object) -> str:
    """Formats a value for a message, in at most one line.

    Args:
      value: any value.

    Returns:
      Dtype and shape of an array with axes, else the shortened `repr`.

    Example:
      >>> describe(np.zeros((2, 3))), describe("x")
      ('float64[2,3]', "'x'")
    """
    if isinstance(value, np.ndarray | jax.Array) and np.ndim(value):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    text = " ".join(_REPR.repr(value).split())
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"


def _range_text(
    at_least: float | None,
    above: float | None,
    at_most: float | None,
    below: float | None,
) -> str:
    """Formats a range, such as "in [0, 1)" or "positive"."""
    lower = at_least if above is None else above
    upper = at_most if below is None else below
    if lower is not None and upper is not None:
        left, right = "[" if above is None else "(", "]" if below is None else ")"
        return f"in {left}{lower}, {upper}{right}"
    if above is not None:
        return "positive" if above == 0 else f"above {above}"
    if at_least is not None:
        return f"at least {at_least}"
    if upper is not None:
        return f"at most {upper}" if below is None else f"below {upper}"
    return "finite"


def _is_infinite(number: float) -> bool:
    """Returns whether a number is infinite, or has no float."""
    try:
        return math.isinf(number)
    except OverflowError:
        return True


def _is_scalar_array(value: object, *kinds: Any) -> bool:
    """Returns whether a value is an array without axes of one of the dtype kinds."""
    if not isinstance(value, np.generic | np.ndarray | jax.Array):
        return False
    return value.shape == () and any(jnp.issubdtype(value.dtype, k) for k in kinds)


def _is_numeric(dtype: Any) -> bool:
    """Returns whether JAX has arrays of a dtype."""
    return jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)


def _with_article(kind: type) -> str:
    """Formats the name of a class with its article."""
    article = "an" if kind.__name__[0] in "AEIO" else "a"
    return f"{article} {kind.__name__}"


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


def check_weights(
    weights: jax.Array | None, workers: int, call: str = "sync(state, weight)"
) -> jax.Array | None:
    """Returns the weights of a synchronisation as a floating point array.

    The elements are checked only if they are concrete, not under a trace.

    Args:
      weights: `(K,)`, or None for equal weights.
      workers: K.
      call: public call and argument.

    Returns:
      `(K,)`, or None.

    Raises:
      TypeError: if the weights are not real numbers.
      ValueError: if the shape is not `(K,)`, or a weight is neither 0 nor in the range
        in which products with parameters and sums do not overflow or vanish.
    """
    if weights is None:
        return None
    concrete = not is_traced(weights)
    values = np.asarray(weights) if concrete else weights
    if values.shape != (workers,):
        raise ValueError(
            f"{call}: weight must have shape ({workers},), one for each worker, got "
            f"{values.shape}"
        )
    if not jnp.issubdtype(values.dtype, np.number) and values.dtype != bool:
        raise TypeError(f"{call}: weights must be numbers, got dtype {values.dtype}")
    if jnp.issubdtype(values.dtype, np.complexfloating):
        raise TypeError(f"{call}: weights must be real, got dtype {values.dtype}")
    if concrete:
        _check_weight_range(call, np.asarray(values))
    return jnp.asarray(values, jnp.result_type(float))


def _check_weight_range(call: str, values: np.ndarray) -> None:
    """Raises a ValueError for weights that are negative or of extreme size."""
    valid = (values == 0) | ((values >= _MIN_WEIGHT) & (values <= _MAX_WEIGHT))
    worker = int(valid.argmin())
    text = f"a weight must be 0 or in [{_MIN_WEIGHT}, {_MAX_WEIGHT}]"
    got = f"{values[worker]} for worker {worker}"
    check(valid.all(), call, text, got)
