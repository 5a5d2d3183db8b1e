"""Calls of `save`, with the state of the data where it is wanted."""

import inspect
from collections.abc import Callable
from typing import Any

from localsgd_jax.core.types import State

_NAME = "data_state"


class Saver:
    """Function that calls `save` with the arguments that it takes.

    Attributes:
      read_state: returns a copy of the state of the batches; None if `save` does not
        take it or the batches have none.
    """

    def __init__(
        self, save: Callable | None, read_state: Callable[[], Any] | None
    ) -> None:
        """Reads the signature of `save`.

        Args:
          save: argument of `train`.
          read_state: returns a copy of the state of the batches; None if they have
            none.
        """
        self._save = save
        self.read_state = read_state if _takes_data_state(save) else None

    def __call__(self, state: State, examples: int, data_state: Any) -> None:
        """Calls `save`.

        Args:
          state: state to save.
          examples: number of examples used since the call of `train` began.
          data_state: state of the batches after the batch that was used last.
        """
        assert self._save is not None
        if self.read_state is None:
            self._save(state, examples)
        else:
            self._save(state, examples, data_state=data_state)


def _takes_data_state(save: Callable | None) -> bool:
    """Returns whether a function has an argument for the state of the data."""
    if save is None:
        return False
    try:
        parameters = inspect.signature(save).parameters.values()
    except ValueError:  # A function of an extension module.
        return False
    return any(x.name == _NAME or x.kind is x.VAR_KEYWORD for x in parameters)
