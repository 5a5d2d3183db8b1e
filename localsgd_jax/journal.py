"""The history of a run: a row for each round."""

import contextlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized

import jax
import numpy as np

from localsgd_jax import agreement, processes
from localsgd_jax.base import Cluster, Notes, PyTree, State
from localsgd_jax.consensus import consensus
from localsgd_jax.traffic import Span

History = dict[str, np.ndarray]
COLUMNS = ("step", "round", "bytes", "seconds")


class NonFiniteLossError(FloatingPointError):
    """The loss is no longer a number.

    Attributes:
      step: the first local update whose loss was not finite.
      workers: the workers concerned.
      history: all rounds before.
      state: the state after the last dispatched step.
    """

    def __init__(
        self, step: int, workers: list[int], history: History, state: State
    ) -> None:
        """Names the step and the workers."""
        super().__init__(
            f"train(): the loss is not finite at step {step} for the workers {workers}"
        )
        self.step, self.workers = step, workers
        self.history, self.state = history, state


def notes(state: State) -> dict[str, jax.Array]:
    """Returns the numbers that rules have left for the history.

    Args:
      state: of a cluster.

    Returns:
      Scalars by name; where several rules use one name, the last one's.
    """
    parts = jax.tree.leaves(state.agreed, is_leaf=lambda x: isinstance(x, Notes))
    found = [part.numbers for part in parts if isinstance(part, Notes)]
    return {name: number for numbers in found for name, number in numbers.items()}


class Journal:
    """The history: a row for each round, made from the metrics of its steps."""

    def __init__(
        self,
        cluster: Cluster,
        state: State,
        evaluate: Callable | None,
        field: str | Sequence[str] | None,
        record: Callable | None,
    ) -> None:
        """Starts at the counters of the state."""
        self.shapes = jax.eval_shape(lambda state: state, state)
        self.sent, self.range = cluster.sent, cluster.sent(self.shapes, None)
        self.evaluate, self.field = evaluate, field
        self.holders = processes.holders(state.step.sharding)
        self.leads = jax.process_index() == self.holders[0]
        self.record, self.bar = record if self.leads else None, None
        self.step, self.round = int(state.step), int(state.round)
        self.bytes, self.device_bytes = 0, 0.0
        self.began, self.rows, self.recorded = time.perf_counter(), [], 0
        self.unfinished, self.told, self.held = [], 0, []

    def read(self, computed: tuple | None, state: State, last: bool = False) -> None:
        """Waits for the metrics of a dispatch and ends the rounds in it."""
        if computed is not None:
            self.held.append(computed)
        talks = len(self.holders) > 1
        if talks and not last and not any(any(due) for due, *_ in self.held):
            # Other processes are asked for their metrics once a round, not before.
            jax.block_until_ready(computed)
            return
        held, self.held = self.held, []
        for due, found, span in held:
            metrics, noted = processes.on_host(found)
            self._add(due, metrics, noted, span, state)

    def _add(
        self,
        due: list[bool],
        metrics: Mapping,
        noted: Mapping,
        span: Span | None,
        state: State,
    ) -> None:
        """Adds the steps of a dispatch, and the rows of the rounds that end in it."""
        for i, end in enumerate(due):
            now = {name: values[i] for name, values in metrics.items()}
            self.step += 1
            self._check_finite(now.get("loss"), state)
            self.unfinished.append({name: x.mean() for name, x in now.items()})
            if end:
                noted_now = {name: values[i] for name, values in noted.items()}
                self.end_round(noted_now, span)
        if self.bar is not None:
            self.bar.update(len(due))

    def end_round(self, noted: Mapping, span: Span | None) -> None:
        """Adds the row of a round, with the notes of its rules."""
        self._write()
        self.round += 1
        steps, self.unfinished = self.unfinished, []
        row: dict[str, float] = {"step": self.step, "round": self.round}
        row |= self._count_bytes(span)
        row["seconds"] = time.perf_counter() - self.began
        row |= {
            name: float(np.mean([step[name] for step in steps])) for name in steps[0]
        }
        row |= {name: float(number) for name, number in noted.items()}
        self.rows.append(row)
        if self.bar is not None:
            self.bar.set_postfix(shown(row))

    def _count_bytes(self, span: Span | None) -> dict[str, float]:
        """Adds what the round sent; where rounds differ the traced program knows."""
        least, most = self.range
        now = most if least == most else self.sent(self.shapes, self.round)[1]
        self.bytes += now
        if span is None:
            return {"bytes": self.bytes}
        self.device_bytes += span.at((now - least) / max(most - least, 1))
        return {"bytes": self.bytes, "device_bytes": round(self.device_bytes)}

    def news(self) -> list[dict]:
        """Returns the rows since the last call."""
        rows = self.rows[self.told :]
        self.told = len(self.rows)
        return rows

    def look(self, state: State) -> None:
        """Evaluates the consensus at the end of the last round, once."""
        if self.evaluate and len(self.rows) > self.recorded:
            model = consensus(state, self.field)
            once = self.holders if processes.local(model) else []
            found = agreement.told("train(evaluate)", lambda: self._judge(model), once)
            self.rows[-1] |= found
        self._write()

    def _judge(self, model: PyTree) -> dict[str, float]:
        """Evaluates a model."""
        return as_numbers(self.evaluate(model))

    def history(self) -> History:
        """Returns the rows as columns; those that every row has also without one."""
        names = dict.fromkeys([*COLUMNS, *(name for row in self.rows for name in row)])
        return {
            name: np.array([row.get(name, math.nan) for row in self.rows])
            for name in names
        }

    def _write(self) -> None:
        """Hands on the rows that nothing can be added to any more."""
        if self.record:
            for row in self.rows[self.recorded :]:
                self.record(row)
        self.recorded = len(self.rows)

    def _check_finite(self, loss: np.ndarray | None, state: State) -> None:
        """Stops at a step where a worker's loss is not finite."""
        if loss is None or np.isfinite(loss).all():
            return
        self._write()
        workers = np.flatnonzero(~np.isfinite(loss)).tolist()
        raise NonFiniteLossError(self.step, workers, self.history(), state)


def shown(row: Mapping[str, float]) -> dict[str, float]:
    """Returns what a progress bar says of a round.

    Args:
      row: of a history.

    Returns:
      A few numbers by name.
    """
    loss = {"loss": row["loss"]} if "loss" in row else {}
    return loss | {"round": row["round"], "MB": row["bytes"] / 1e6}


def as_numbers(values: object) -> dict[str, float]:
    """Returns what `evaluate` gave as floats by name.

    Args:
      values: a number, or a dict of numbers.

    Returns:
      The dict; one number is called "evaluation".
    """
    named = values if isinstance(values, Mapping) else {"evaluation": values}
    return {name: _number(name, x) for name, x in named.items()}


def _number(name: str, value: object) -> float:
    """Returns what `evaluate` gave as a float; refuses what is not one number."""
    if np.ndim(value) or not np.issubdtype(np.asarray(value).dtype, np.number):
        raise TypeError(
            "train(evaluate): it must return a number or a dict of numbers, got "
            f"{value!r} for {name!r}"
        )
    return float(np.asarray(value))


@contextlib.contextmanager
def open_bar(progress: bool | None, steps: int | None, batches: Iterable) -> Iterator:
    """Opens a progress bar, or gives None."""
    if progress is None:
        progress = importlib.util.find_spec("tqdm") is not None
    if not progress:
        yield None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("train(progress=True) needs tqdm: pip install tqdm") from None
    known = len(batches) if isinstance(batches, Sized) else None
    total = min((n for n in (steps, known) if n is not None), default=None)
    with tqdm(total=total, unit="step") as bar:
        yield bar
