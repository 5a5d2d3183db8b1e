"""Callbacks of both training loops: evaluation, history rows and saving.

`training.segments` plans when they are called. `training.outputs` calls `evaluate` and
`on_round_end`, and `training.loop` calls `save`; `fault_tolerance.mean_callbacks` calls
all three for the mean over live processes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check_int, check_names, check_type, describe


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """Functions that a training loop calls, with their periods.

    The arguments of the same names of `localsgd_jax.train` and of
    `localsgd_jax.fault_tolerance.train`.

    Attributes:
      evaluate: `evaluate(model) -> number or dict of numbers`, with the mean model;
        None for no evaluation.
      evaluate_every: rounds with a multiple of this number are evaluated, and the last.
      eval_fields: fields of the train state that `evaluate` receives, as `field` of
        `consensus`.
      on_round_end: `on_round_end(row)`, with each row of the history once, in the order
        of the rounds, when no column can be added to it any more.
      save: `save(state, examples)`, with the number of examples used since the call of
        `train` began; None for no saving.
      save_every: number of local steps between two calls of `save`.

    Raises:
      TypeError: if a function is not callable, a field no name, or a period no int.
      ValueError: if one of them is below 1.
    """

    evaluate: Callable | None = None
    evaluate_every: int = 1
    eval_fields: str | Sequence[str] | None = "params"
    on_round_end: Callable | None = None
    save: Callable | None = None
    save_every: int = 1000

    def __post_init__(self) -> None:
        """Validates functions, names and the two periods."""
        for name in ("evaluate", "on_round_end", "save"):
            if getattr(self, name) is not None:
                check_type(f"train({name})", name, getattr(self, name), Callable)
        if self.eval_fields is not None:
            check_names("train(eval_fields)", "eval_fields", self.eval_fields)
        for name in ("evaluate_every", "save_every"):
            check_int(f"train({name})", name, getattr(self, name), 1)

    def evaluates_at(self, round_number: int) -> bool:
        """Returns whether a round is evaluated that is not the last."""
        return self.evaluate is not None and round_number % self.evaluate_every == 0

    def saves_at(self, step: int) -> bool:
        """Returns whether the state is saved after a step that is not the last."""
        return self.save is not None and step % self.save_every == 0

    def run_evaluate(self, model: PyTree) -> dict[str, float]:
        """Evaluates the mean model.

        Args:
          model: the mean of `eval_fields` over workers.

        Returns:
          The values by name; a single number is called "evaluation".

        Raises:
          TypeError: if `evaluate` returns anything else than numbers.
        """
        assert self.evaluate is not None
        values = self.evaluate(model)
        named = values if isinstance(values, Mapping) else {"evaluation": values}
        return {name: _to_float(name, value) for name, value in named.items()}


class RowReporter:
    """Wrapper of a function that is called once with each row of a history.

    Attributes:
      num_reported: number of rows that were reported, or skipped without a function.
    """

    def __init__(self, callback: Callable | None) -> None:
        """Starts before the first row; without a callback rows are only counted."""
        self.callback, self.num_reported = callback, 0

    def report(self, rows: Sequence[Mapping[str, Any]], *args: Any) -> None:
        """Calls the function with each row that has not been reported yet.

        Args:
          rows: all rows from the first on that are complete.
          *args: further arguments of the function.
        """
        new_rows = rows[self.num_reported :]
        if self.callback:
            for row in new_rows:
                self.callback(row, *args)
        self.num_reported += len(new_rows)


def _to_float(name: str, value: object) -> float:
    """Converts a value from `evaluate`; raises a TypeError unless it is one number."""
    if np.ndim(value) or not np.issubdtype(np.asarray(value).dtype, np.number):  # pyright: ignore[reportArgumentType]
        raise TypeError(
            "train(evaluate): it must return a number or a dict of numbers, got "
            f"{describe(value)} for {name!r}"
        )
    return float(np.asarray(value))
