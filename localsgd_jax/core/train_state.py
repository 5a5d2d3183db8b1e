"""Access to named fields of a train state: NamedTuple, dataclass or mapping."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from localsgd_jax.core.types import PyTree


def get_fields(state: PyTree, names: Iterable[str]) -> dict[str, PyTree]:
    """Returns the named fields of a train state.

    Args:
      state: a NamedTuple, a dataclass instance or a mapping.
      names: names of fields.

    Returns:
      Values by name.

    Raises:
      TypeError: if the state is of another type.
      ValueError: if a field does not exist.
    """
    existing = field_names(state)
    for name in names:
        if name not in existing:
            raise ValueError(
                f"field {name!r}: the train state has no such field; it has {existing}"
            )
    if isinstance(state, Mapping):
        return {name: state[name] for name in names}
    return {name: getattr(state, name) for name in names}


def replace_fields(state: PyTree, values: Mapping[str, PyTree]) -> PyTree:
    """Returns a copy of a train state with some fields replaced."""
    if isinstance(state, dict):
        # The operator keeps subclasses: defaultdict with its factory, OrderedDict.
        return state | dict(values)
    if isinstance(state, Mapping):
        return cast(Callable, type(state))({**state, **values})
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        return dataclasses.replace(state, **values)
    return cast(Any, state)._replace(**values)


def field_names(state: PyTree) -> list[str]:
    """Returns the names of all fields of a train state."""
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
