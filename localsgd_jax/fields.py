"""Named fields of a train state: a NamedTuple, a dataclass or a dict."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from localsgd_jax.base import PyTree


def read(state: PyTree, names: Iterable[str]) -> dict[str, PyTree]:
    """Returns the named fields; names the one that is missing."""
    known = of(state)
    for name in names:
        if name not in known:
            raise ValueError(
                f"rule for the field {name!r}: the train state has no such field; "
                f"it has {known}"
            )
    if isinstance(state, Mapping):
        return {name: state[name] for name in names}
    return {name: getattr(state, name) for name in names}


def write(state: PyTree, values: Mapping[str, PyTree]) -> PyTree:
    """Returns the state with some fields replaced."""
    if isinstance(state, dict):
        return state | values  # Keeps a defaultdict and an OrderedDict what they are.
    if isinstance(state, Mapping):
        kind: Callable = type(state)
        return kind({**state, **values})
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        return dataclasses.replace(state, **values)
    return state._replace(**values)


def of(state: PyTree) -> list[str]:
    """Returns the names of all fields."""
    if isinstance(state, Mapping):
        return list(state)
    if dataclasses.is_dataclass(state):
        return [field.name for field in dataclasses.fields(state)]
    if hasattr(state, "_fields"):
        return list(state._fields)
    raise TypeError(
        "from_train_step(train_step): the train state must be a NamedTuple, a "
        f"dataclass or a dict, got {type(state).__name__}"
    )
