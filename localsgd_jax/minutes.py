"""What processes that meet write down, look at and keep."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from localsgd_jax import fields
from localsgd_jax.apart import Apart
from localsgd_jax.base import PyTree, State
from localsgd_jax.company import Company, CompanyError
from localsgd_jax.journal import (
    COLUMNS,
    History,
    NonFiniteLossError,
    as_numbers,
    notes,
    shown,
)

STEPS, WORK, ENDED, LEAVING, METRICS = range(5)
EACH = ("work", "waited", "steps")


class Looks(NamedTuple):
    """What is looked at and kept: the arguments of `resilient.train` of those names."""

    evaluate: Callable | None
    evaluate_every: int
    field: str | Sequence[str] | None
    record: Callable | None
    save: Callable | None
    save_every: int


class Minutes:
    """The history of a run, the same in all processes but for what only one sees."""

    def __init__(
        self, mine: Apart, company: Company, state: State, looks: Looks
    ) -> None:
        """Starts at the counters of the state."""
        self.mine, self.company, self.looks = mine, company, looks
        self.step, self.round = int(state.step), int(state.round)
        self.start = self.saved = self.step
        self.range, self.bytes, self.batch = mine.sent(state), 0, 0
        self.began, self.rows, self.written = time.perf_counter(), [], 0
        self.bar = None

    def count(self, batches: PyTree) -> None:
        """Notes how many examples a worker takes in a step."""
        self.batch = math.prod(np.shape(jax.tree.leaves(batches)[0])[2:3])

    def add(
        self,
        step: int,
        living: list[int],
        table: np.ndarray,
        names: list[str],
        seconds: float,
        state: State,
    ) -> None:
        """Adds the row of a round from the notes of all who met.

        Args:
          step: local updates of the fastest.
          living: who met.
          table: a note of each.
          names: of the metrics in it.
          seconds: from the arrival of this process until all had agreed.
          state: after the meeting.
        """
        taken = step - self.step
        self.step, self.round = step, self.round + 1
        least, most = self.range
        self.bytes += most if least == most else self.mine.sent(state, self.round)[1]
        done, work = table[:, STEPS], table[:, WORK]
        waited = work.max() - work
        each = partial(self._by_process, living)
        row = {
            "step": step,
            "round": self.round,
            "bytes": self.bytes,
            "seconds": time.perf_counter() - self.began,
            "alive": len(living),
            "slowest": living[int(work.argmax())],
            "exchange": seconds - float(waited[living.index(self.company.me)]),
            "work": each(work),
            "waited": each(waited),
            "steps": each(done),
        }
        for i, name in enumerate(names, METRICS):
            row[name] = float(done @ np.where(done > 0, table[:, i], 0) / done.sum())
        self._check_finite(row, living, table[:, METRICS:], names, state)
        row |= {name: float(number) for name, number in notes(state).items()}
        self.rows.append(row)
        if self.bar is not None:
            self.bar.update(taken)
            self.bar.set_postfix(shown(row) | {"alive": row["alive"]})

    def look(self, state: State, last: bool) -> None:
        """Evaluates and saves the mean of the living where it is time; records."""
        looks, leads = self.looks, self.company.me == 0
        fresh = len(self.rows) > self.written
        if looks.evaluate and fresh:
            if last or self.round % looks.evaluate_every == 0:
                self._evaluate(looks.evaluate, state, leads)
        if looks.save and self.step > self.saved:
            if last or self.step // looks.save_every > self.saved // looks.save_every:
                self._save(looks.save, state, leads)
        if looks.record and leads:
            with self._heard():
                for row in self.rows[self.written :]:
                    looks.record(row)
        self.written = len(self.rows)

    def close(self) -> None:
        """Meets once more: who is done must hear whether process 0 is, too."""
        self.company.together(lambda devices: None)

    def history(self) -> History:
        """Returns the rows as columns; what each process has had is (R, N)."""
        always = (*COLUMNS, "alive", "slowest", "exchange", *EACH)
        names = dict.fromkeys([*always, *(name for row in self.rows for name in row)])
        rows, everyone = len(self.rows), len(self.company.everyone)
        return {
            name: np.array([row.get(name, math.nan) for row in self.rows]).reshape(
                (rows, everyone) if name in EACH else (rows,)
            )
            for name in names
        }

    def _evaluate(self, evaluate: Callable, state: State, leads: bool) -> None:
        """Evaluates the mean of the living."""
        field = self.looks.field
        tree = state.workers
        if field is not None:
            names = (field,) if isinstance(field, str) else tuple(field)
            tree = fields.read(tree, names)
        model = self.company.together(partial(self.mine.mean, tree))
        if leads:
            model = model[field] if isinstance(field, str) else model
            with self._heard():
                self.rows[-1] |= as_numbers(evaluate(model))

    def _save(self, save: Callable, state: State, leads: bool) -> None:
        """Saves the mean of the living, as one worker."""
        pair = (state.workers, state.own)
        means = self.company.together(partial(self.mine.mean, pair))
        self.saved = self.step
        if leads:
            workers, own = jax.tree.map(lambda x: x[None], means)
            one = state._replace(workers=workers, own=own)
            dealt = (self.step - self.start) * self.mine.workers * self.batch
            with self._heard():
                save(one, dealt)

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Lets an error of this process end the others, who are told the reason."""
        try:
            yield
        except Exception as error:
            with suppress(CompanyError):
                self.company.together(partial(_raise, error))
            raise

    def _by_process(self, living: list[int], values: np.ndarray) -> list[float]:
        """Returns a number for each process that there was at first, NaN for others."""
        known = dict(zip(living, values.tolist(), strict=True))
        return [known.get(process, math.nan) for process in self.company.everyone]

    def _check_finite(
        self, row: dict, living: list, metrics: np.ndarray, names: list, state: State
    ) -> None:
        """Stops in all processes where the loss of one is not finite."""
        if math.isfinite(row.get("loss", 0)):
            return
        loss = metrics[:, names.index("loss")]
        wrong = [p for p, x in zip(living, loss, strict=True) if not np.isfinite(x)]
        workers = [k for k, owner in enumerate(self.mine.owners) if owner in wrong]
        raise NonFiniteLossError(row["step"], workers, self.history(), state)


def _raise(error: Exception, devices: list) -> None:
    """Fails where the others wait."""
    raise error
