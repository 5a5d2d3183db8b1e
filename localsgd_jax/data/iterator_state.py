"""States of checkpointable iterators: reading, setting, and their form in JSON.

An iterator is checkpointable if it has a pair of methods:

    get_state, set_state            Grain
    state_dict, load_state_dict     the stateful loaders of PyTorch
"""

import base64
import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from localsgd_jax.core.validation import describe

PAIRS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))
# Key of the objects that stand for values without a form in JSON.
_TAG = "__type__"


def state_reader(*candidates: object) -> Callable[[], Any] | None:
    """Returns a function that copies the current state of an iterator.

    Args:
      *candidates: objects that may be checkpointable, such as an iterable and its
        iterator; the first one that is counts.

    Returns:
      The function; None if no object is checkpointable.

    Example:
      >>> class Count:
      ...     position = 0
      ...     def get_state(self):
      ...         return {"position": self.position}
      ...     def set_state(self, state):
      ...         self.position = state["position"]
      >>> state_reader(Count())()
      {'position': 0}
    """
    for candidate in candidates:
        methods = _methods(candidate)
        if methods:
            read = methods[0]
            # An iterator may return an object that it changes later.
            return lambda: copy.deepcopy(read())
    return None


def check_checkpointable(call: str, batches: object) -> None:
    """Raises a TypeError unless an iterator has methods for its state.

    Args:
      call: public call and argument, such as "restore(batches)".
      batches: the iterator.
    """
    if _methods(batches) is None:
        pairs = " or ".join(" and ".join(names) for names in PAIRS)
        raise TypeError(
            f"{call}: batches must have {pairs}, such as iter(dataset) of Grain, got "
            f"{describe(batches)}"
        )


def set_iterator_state(batches: object, state: Any) -> None:
    """Sets a checkpointable iterator to a state that it has returned before.

    Args:
      batches: an iterator that `check_checkpointable` accepts.
      state: the state.
    """
    methods = _methods(batches)
    assert methods is not None
    methods[1](state)


def to_json(call: str, state: Any, path: str = "") -> Any:
    """Returns the form in JSON of a state of an iterator.

    Numbers, strings, None, lists and dicts remain; bytes, tuples, NumPy arrays and
    scalars, and dicts with other keys than strings become tagged objects.

    Args:
      call: public call and argument for the error.
      state: from `get_state` or `state_dict`.
      path: path of the value in the state, for the error.

    Returns:
      JSON-compatible data.

    Raises:
      TypeError: names the path of a value of another type.

    Example:
      >>> from_json(to_json("save(data_state)", {"next": (3, b"x")}))
      {'next': (3, b'x')}
    """
    if state is None or isinstance(state, bool | int | float | str):
        return state
    if isinstance(state, list):
        return [to_json(call, x, f"{path}[{i}]") for i, x in enumerate(state)]
    if isinstance(state, tuple) and type(state) is tuple:
        return {_TAG: "tuple", "items": to_json(call, list(state), path)}
    if isinstance(state, bytes):
        return {_TAG: "bytes", "base64": base64.b64encode(state).decode()}
    if isinstance(state, np.ndarray | np.generic) and state.dtype.kind in "biufc":
        return _array_to_json(state)
    if isinstance(state, Mapping):
        return _mapping_to_json(call, state, path)
    raise TypeError(
        f"{call}: the state of an iterator must consist of numbers, strings, bytes, "
        f"NumPy arrays, lists, tuples and dicts, got {describe(state)} at "
        f"{path or 'the root'}"
    )


def from_json(stored: Any) -> Any:
    """Returns the state of an iterator from its form in JSON.

    Args:
      stored: from `to_json`.

    Returns:
      The state.
    """
    if isinstance(stored, list):
        return [from_json(x) for x in stored]
    if not isinstance(stored, dict):
        return stored
    kind = stored.get(_TAG)
    if kind is None:
        return {name: from_json(x) for name, x in stored.items()}
    if kind == "tuple":
        return tuple(from_json(stored["items"]))
    if kind == "bytes":
        return base64.b64decode(stored["base64"])
    if kind == "dict":
        return {from_json(key): from_json(x) for key, x in stored["items"]}
    data = np.frombuffer(base64.b64decode(stored["base64"]), np.dtype(stored["dtype"]))
    array = data.reshape(stored["shape"]).copy()
    return array if kind == "array" else array[()]


def _methods(candidate: object) -> tuple[Callable, Callable] | None:
    """Returns the pair of methods of a checkpointable object, or None."""
    for names in PAIRS:
        found = tuple(getattr(candidate, name, None) for name in names)
        if all(map(callable, found)):
            return found  # pyright: ignore[reportReturnType]
    return None


def _array_to_json(array: np.ndarray | np.generic) -> dict:
    """Returns the tagged object of an array or of a scalar."""
    kind = "array" if isinstance(array, np.ndarray) else "scalar"
    text = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    shape = list(np.shape(array))
    return {_TAG: kind, "dtype": array.dtype.str, "shape": shape, "base64": text}


def _mapping_to_json(call: str, state: Mapping, path: str) -> dict:
    """Returns a dict with string keys as it is, and another one as tagged pairs."""
    values = {key: to_json(call, x, f"{path}[{key!r}]") for key, x in state.items()}
    if _TAG not in values and all(isinstance(key, str) for key in values):
        return values
    pairs = [[to_json(call, key, path), x] for key, x in values.items()]
    return {_TAG: "dict", "items": pairs}
