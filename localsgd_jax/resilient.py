"""The host loop of processes that may die: each computes alone, the living agree."""

import itertools
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax import agreement, checks, processes, schedules
from localsgd_jax.adaptive import Adaptive
from localsgd_jax.apart import Apart, catch_up, in_background
from localsgd_jax.base import PyTree, State
from localsgd_jax.company import Company
from localsgd_jax.feed import Queue
from localsgd_jax.journal import History, open_bar
from localsgd_jax.minutes import ENDED, LEAVING, STEPS, Looks, Minutes

PREEMPTED = 128 + signal.SIGTERM
TOO_FEW = 75
PIECES = 8
CHUNK = 64


class Pace(NamedTuple):
    """How long a process computes alone.

    Attributes:
      schedule: when a round ends, by the number of local updates.
      steps: after which the run ends; None for all batches.
      seconds: after which a round ends with fewer local steps; None: never.
      least: processes with which the run goes on.
    """

    schedule: Callable
    steps: int | None
    seconds: float | None
    least: int


def train(
    mine: Apart,
    state: State,
    batches: Iterable[PyTree],
    *,
    every: int | Callable,
    steps: int | None = None,
    seconds: float | None = None,
    overlap: bool = False,
    evaluate: Callable | None = None,
    evaluate_every: int = 1,
    field: str | Sequence[str] | None = "params",
    record: Callable | None = None,
    save: Callable | None = None,
    save_every: int = 1000,
    progress: bool | None = None,
    least: int = 1,
    timeout: float = 60.0,
    patience: float = 600.0,
) -> tuple[State, History]:
    """Trains as `lsgd.train` does, on those processes that live.

    A process takes its local steps in a program of its own, and no death can disturb
    it. Then it meets the others who live:

        xₖ ← rule(xⱼ of the living j)

    If one dies before or during that, the others do it again without it, from where
    each has come by itself. Process 0 serves the others: if it dies all end, and the
    job has to be started again (`localsgd launch --elastic --restarts n`).

    SIGTERM to a process other than 0 ends it with exit code 143 after it has met the
    others once more, so that they keep its progress. SIGTERM to process 0 ends all of
    them so, after a checkpoint.

    Args:
      mine: from `apart`.
      state: from `mine.init` or `mine.spread`.
      batches: leaves `(K, B, ...)`, of which a process takes its rows, or only those.
      every: a period or a schedule, called with the number of local updates.
      steps: local steps at most; None for all batches.
      seconds: a process whose round has lasted so long ends it with the local steps
        that it has done, at least one, and workers weigh in the mean by their local
        steps; None: all take as many.
      overlap: whether the mean travels while the next round is computed, as
        `lsgd.overlap` has it.
      evaluate: from the mean model to a number or a dict of them. Given in all
        processes, as is `save`, and called in process 0.
      evaluate_every: rounds whose number is a multiple are evaluated, and the last.
      field: what `evaluate` gets, as in `consensus`.
      record: called in process 0 with each row of the history.
      save: given in all processes and called in process 0, with a state of one worker,
        the mean of all (`mine.one` is its cluster), and the examples dealt since the
        call began.
      save_every: local steps after which the next round's end is saved, as is the end.
      progress: whether process 0 shows a progress bar; None: if tqdm is installed.
      least: with fewer processes all end with exit code 75, after a checkpoint.
      timeout: seconds that a synchronisation may take once all who live are there.
      patience: seconds to wait for a process that lives and does not come.

    Returns:
      The state, agreed on, and the history of `lsgd.train`, where "step" counts the
      steps of the fastest, with three columns more: "alive", the number of processes;
      "slowest", the one that the others waited for; and "exchange", the seconds that
      this process took to agree without waiting; and with an entry for each process,
      NaN for the dead: "work", seconds from one meeting to the next; "waited", seconds
      that it stood there until the slowest came; "steps", local steps in the round.

    Raises:
      CompanyError: if the living cannot go on; in the others, if `evaluate`, `record`
        or `save` fails in process 0.
      JobError: at the start, if the processes are about to do different things.
      NonFiniteLossError: in all, when the mean of the metric "loss" over a round of a
        process is not finite; it names all workers of that process.
      SystemExit: with 143 or 75, as said above.
      ValueError: if an argument is out of range.
    """
    _check_counts(
        steps=steps, evaluate_every=evaluate_every, save_every=save_every, least=least
    )
    _check_seconds(seconds=seconds, timeout=timeout, patience=patience)
    pace = Pace(_schedule(every), steps, seconds, least)
    company = Company(mine.devices, timeout, patience)
    if least > len(company.everyone):
        raise ValueError(
            f"train(least): there are {len(company.everyone)} processes, got {least}"
        )
    looks = Looks(evaluate, evaluate_every, field, record, save, save_every)
    agreement.same("train()", _facts(state, pace, overlap, looks))
    minutes = Minutes(mine, company, state, looks)
    loop = _Loop(mine, company, minutes, batches, pace)
    shows = company.me == 0 and progress
    with _on_sigterm(loop.leave), open_bar(shows, steps, batches) as minutes.bar:
        state = _run(loop, state, overlap)
        minutes.close()
    if loop.code:
        raise SystemExit(loop.code)
    return state, minutes.history()


def _run(loop: "_Loop", state: State, overlap: bool) -> State:
    """Computes and meets until it is over."""
    travel = None
    while not loop.over:
        state, note = loop.compute(state)
        if travel:
            state = loop.arrive(travel, state)
            if loop.idle:
                break
        travel = loop.depart(state, note)
        if loop.over or not overlap:
            state, travel = loop.arrive(travel, state), None
    return state


class _Travel(NamedTuple):
    """A state on its way to the others.

    Attributes:
      captured: the state that was sent.
      planned: the local updates in it.
      future: what is agreed on, the notes of all, and the seconds that it took.
    """

    captured: State
    planned: int
    future: Future


class _Loop:
    """One process between its meetings with the others."""

    def __init__(
        self,
        mine: Apart,
        company: Company,
        minutes: Minutes,
        batches: Iterable[PyTree],
        pace: Pace,
    ) -> None:
        """Has not begun."""
        self.mine, self.company, self.minutes, self.pace = mine, company, minutes, pace
        self.step = self.planned = minutes.step
        self.end = self.step + (math.inf if pace.steps is None else pace.steps)
        self.over, self.idle = self.step >= self.end, False
        self.leaving, self.code = False, 0
        self.there = set(company.everyone)
        rows = (_own_rows(mine, batch) for batch in batches)
        self.queue = Queue(rows, mine.here.put, ahead=1)
        self.names: list[str] = []
        self.began = time.monotonic()

    def compute(self, state: State) -> tuple[State, np.ndarray]:
        """Takes the local steps of a round; notes what the others must know."""
        wanted, done, seen = self._length(), 0, []
        piece = wanted if self.pace.seconds is None else -(-wanted // PIECES)
        self.queue.ahead = max(1, min(piece, CHUNK))
        while done < wanted and (ready := self.queue.ready()):
            taken = self.queue.pop(count := min(self.queue.ahead, wanted - done, ready))
            state, metrics = self.mine.round(state, taken)
            seen.append((count, _means(metrics)))
            self.minutes.count(taken)
            done += count
            if self.leaving or self._late():
                break
        self.planned += done
        return state, self._note(seen, done)

    def depart(self, state: State, note: np.ndarray) -> _Travel:
        """Sends a state to the others."""
        weigh = self.pace.seconds is not None

        def meet(devices: list) -> tuple[State, np.ndarray]:
            return self.mine.agree(state, note, devices, weigh)

        def timed() -> tuple[State, np.ndarray, float]:
            began = time.monotonic()
            return *self.company.together(meet), time.monotonic() - began

        return _Travel(state, self.planned, in_background(timed))

    def arrive(self, travel: _Travel, now: State) -> State:
        """Waits for what was agreed on, and adds what was done in the meantime."""
        agreed, notes, seconds = travel.future.result()
        if now is not travel.captured:
            agreed = catch_up(agreed, now, travel.captured)
        self.step += int(notes[:, STEPS].max())
        self.planned = self.step + self.planned - travel.planned
        here = agreed.step.sharding
        state = agreed._replace(step=jax.device_put(np.int32(self.planned), here))
        living = list(self.company.living)
        if notes[:, STEPS].any():
            self.minutes.add(self.step, living, notes, self.names, seconds, state)
            if isinstance(self.pace.schedule, Adaptive):
                self.pace.schedule.learn(self.minutes.rows[-1], self.planned)
        leaving = [p for p, note in zip(living, notes, strict=True) if note[LEAVING]]
        self._tell(living, leaving)
        if not self.over:
            self._decide(living, leaving, notes)
        self.minutes.look(state, self.over)
        self.began = time.monotonic()
        return state

    def leave(self, *signal_and_frame: object) -> None:
        """Asks for the end after the next meeting."""
        self.leaving = True

    def _tell(self, living: list[int], leaving: list[int]) -> None:
        """Says in process 0 who is not there any more, and why."""
        lost, self.there = self.there - set(living), set(living) - set(leaving)
        reasons = dict.fromkeys(
            sorted(lost), "has died, or its heartbeats have stopped"
        )
        reasons |= dict.fromkeys(leaving, "has got SIGTERM")
        for process, reason in reasons.items():
            if self.company.me == 0:
                text = f"train(): from step {self.step} on without process {process}"
                print(f"{text}: it {reason}", file=sys.stderr, flush=True)

    def _decide(self, living: list[int], leaving: list[int], notes: np.ndarray) -> None:
        """Ends the run where all know a reason; leaves alone if only this one must."""
        if living[0] in leaving:
            self.code = PREEMPTED
        elif self.company.me in leaving:
            raise SystemExit(PREEMPTED)
        elif len(living) - len(leaving) < self.pace.least:
            self.code = TOO_FEW
        # Nobody takes another step: what has been agreed on is the end.
        self.idle = bool(notes[:, ENDED].all())
        self.over = bool(self.code or notes[:, ENDED].any())

    def _length(self) -> int:
        """Returns the local steps until the schedule or the run ends the round."""
        left = self.end - self.planned
        steps = itertools.takewhile(lambda i: i < left, itertools.count(1))
        due = (i for i in steps if self.pace.schedule(self.planned + i))
        return int(next(due, max(left, 0)))

    def _late(self) -> bool:
        """Returns whether the time of a round is over."""
        limit = self.pace.seconds
        return limit is not None and time.monotonic() - self.began >= limit

    def _note(self, seen: list[tuple[int, dict]], done: int) -> np.ndarray:
        """Writes down what the others must know about this round."""
        if not self.planned > self.minutes.start:
            raise ValueError("train(batches): at least one is needed, got none")
        if seen:
            self.names = sorted(seen[0][1])
        numbers = [
            sum(count * means[name] for count, means in seen) / max(done, 1)
            for name in self.names
        ]
        self.queue.ahead = 1
        ended = self.planned >= self.end or not self.queue.ready()
        work = time.monotonic() - self.began
        return np.array([done, work, ended, self.leaving, *numbers], np.float32)


def _check_counts(**numbers: Any) -> None:
    """Refuses counts below 1, but for the steps, of which there may be 0 or no end."""
    for name, number in numbers.items():
        if name != "steps" or number is not None:
            checks.integer(f"train({name})", name, number, int(name != "steps"))


def _check_seconds(**numbers: Any) -> None:
    """Refuses times that are not finite and above 0; only `seconds` may be None."""
    for name, number in numbers.items():
        if name != "seconds" or number is not None:
            checks.positive(f"train({name})", name, number)


def _own_rows(mine: Apart, batch: PyTree) -> PyTree:
    """Returns the rows of this process's workers, if there are others."""
    leading = [np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)[:1]]
    if leading != [(mine.workers,)]:
        return batch
    rows = slice(mine.first, mine.first + mine.here.workers)
    return jax.tree.map(lambda x: x[rows], batch)


def _means(metrics: PyTree) -> dict[str, float]:
    """Returns the mean of each metric that is one number for each worker; waits."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=".") or "loss": float(
            np.mean(np.asarray(leaf))
        )
        for path, leaf in jax.tree.leaves_with_path(metrics)
        if leaf.ndim == 2
    }


@contextmanager
def _on_sigterm(leave: Callable) -> Iterator[None]:
    """Lets SIGTERM ask for the end; elsewhere than in the main thread it cannot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _facts(state: State, pace: Pace, overlap: bool, looks: Looks) -> dict:
    """Returns what must be the same in all processes before they meet."""
    step = int(state.step)
    ahead = range(step + 1, step + CHUNK + 1)
    rows = jax.tree.leaves_with_path((state.workers, state.own))
    leaves = {jax.tree_util.keystr(p): f"{x.dtype}{list(x.shape[1:])}" for p, x in rows}
    first = jax.tree.map(
        lambda x: None if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x[0],
        state.workers,
    )
    return {
        "every": [i for i in ahead if pace.schedule(i)],
        "steps": pace.steps if pace.steps is None else int(pace.steps),
        "seconds": pace.seconds is not None,
        "least": int(pace.least),
        "overlap": overlap,
        "evaluate_every": int(looks.evaluate_every) if looks.evaluate else None,
        "field": looks.field,
        "save_every": int(looks.save_every) if looks.save else None,
        "state": {"step": step, "round": int(state.round)},
        "leaves": leaves,
        # Later the workers of different processes need not be equal.
        "start": processes.described(first) if step == 0 else {},
    }


def _schedule(every: int | Callable) -> Callable:
    """Returns a schedule, made from a period if it is one."""
    return every if callable(every) else schedules.every(every)
