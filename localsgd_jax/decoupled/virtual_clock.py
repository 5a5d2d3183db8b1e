"""A decoupled job on a virtual clock."""

import heapq
import itertools
import math
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check_int, check_number, check_type
from localsgd_jax.decoupled.events import Event, Leave, Reply, Tick
from localsgd_jax.decoupled.fragments import join
from localsgd_jax.decoupled.history import History, history_columns
from localsgd_jax.decoupled.job import Job, check_job, shared_params
from localsgd_jax.decoupled.learner import (
    Answer,
    LearnerFunctions,
    Receive,
    Send,
    Steps,
    learner_program,
    make_learner_functions,
)
from localsgd_jax.decoupled.syncer import make_syncer
from localsgd_jax.decoupled.syncer_host import SyncerHost


class Failure(NamedTuple):
    """Loss of a learner on a virtual clock.

    Attributes:
      learner: index of the learner.
      time: time at which its process ends.
      recovery: time from then until it joins again; infinite if it does not.
      detection: time from then until the syncers remove it.
    """

    learner: int
    time: float
    recovery: float = math.inf
    detection: float = 0.0


class Clock(NamedTuple):
    """Speeds and failures of learners on a virtual clock.

    Attributes:
      learners: number of learners.
      speed: local steps per unit of time: a number, or one for each learner.
      delay: time between a learner and a syncer, in each direction.
      start: time at which learners join: a number, or one for each learner.
      failures: losses of learners.
    """

    learners: int
    speed: float | Sequence[float] = 1.0
    delay: float = 0.0
    start: float | Sequence[float] = 0.0
    failures: Sequence[Failure] = ()


def simulate(
    job: Job, clock: Clock, *, log: list[tuple[int, Event]] | None = None
) -> tuple[PyTree, History]:
    """Runs a job in this process on a virtual clock.

    Learners and syncers compute exactly as in `run`; the clock only defines the order
    of their events. Events at one time are applied in the order of the learners before
    any model is sent, so that equal speeds without delay give Algorithm 1 with
    `immediate()`. Equal arguments give bitwise equal results.

    Args:
      job: description of the job.
      clock: speeds and failures of the learners.
      log: a list to which the events are appended, with the fragment of each, for
        `replay`.

    Returns:
      The model and the history, as from `run`; the column "seconds" holds units of the
      virtual clock.

    Raises:
      TypeError: if an argument or a field of the clock has the wrong type.
      ValueError: if a number is out of range.
      RuntimeError: if every learner is lost before the job is done.

    Example:
      >>> import itertools
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> import localsgd_jax as lsgd
      >>> from localsgd_jax import decoupled
      >>> algorithm = lsgd.local_sgd(lambda w, b: ((w["w"] - b) ** 2).mean(),
      ...                            optax.sgd(0.1), rule=lsgd.average())
      >>> job = decoupled.Job(
      ...     algorithm, {"w": jnp.zeros(())},
      ...     lambda learner, start: itertools.repeat(np.ones((1, 2))),
      ...     every=2, steps=12, merge=decoupled.quorum(1))
      >>> params, history = decoupled.simulate(job, decoupled.Clock(2, [1.0, 0.5]))
      >>> int(history["steps"][-1])
      12
    """
    check_job("simulate", job)
    _check_clock(clock)
    check_type("simulate(log)", "log", log, list, type(None))
    return _VirtualRun(job, clock, log).run()


class _Learner:
    """A running learner: its program and the answers that it has received."""

    def __init__(self, functions: LearnerFunctions, index: int, session: int) -> None:
        """Starts the program."""
        self.index, self.session = index, session
        self.program: Generator = learner_program(functions, index, session)
        self.answers: dict[int, Answer] = {}
        self.waiting: int | None = None


class _VirtualRun:
    """Event queue of a virtual run."""

    def __init__(self, job: Job, clock: Clock, log: list | None) -> None:
        """Makes the syncers and schedules the learners."""
        self._job, self._clock = job, clock
        self._functions = make_learner_functions(job)
        self._hosts = [
            SyncerHost(make_syncer(job, fragment), write=_writer(log, fragment))
            for fragment in range(job.fragments)
        ]
        self._speeds = _per_learner("speed", clock.speed, clock.learners)
        self._queue: list[tuple] = []
        self._order = itertools.count()
        self._learners: dict[int, _Learner] = {}
        self._sessions = itertools.count(1)
        self._undelivered: list[tuple[int, Reply]] = []
        starts = _per_learner("start", clock.start, clock.learners)
        for index, time in enumerate(starts):
            self._schedule(time, "start", index)
        for failure in clock.failures:
            self._schedule(failure.time, "stop", failure)

    def run(self) -> tuple[PyTree, History]:
        """Handles events in the order of their times until all learners have ended."""
        while self._queue:
            now = self._queue[0][0]
            while self._queue and self._queue[0][0] <= now:
                _, _, kind, argument = heapq.heappop(self._queue)
                getattr(self, f"_on_{kind}")(now, argument)
            self._deliver(now)
        if self._learners:
            raise RuntimeError(
                "simulate(clock): the remaining learners wait for each other"
            )
        rows = sorted(
            (row for host in self._hosts for row in host.rows),
            key=lambda row: row["seconds"],
        )
        self._check_done()
        params = join(shared_params(self._job), *(host.model() for host in self._hosts))
        return params, history_columns(rows, self._clock.learners)

    def _schedule(self, time: float, kind: str, argument: Any) -> None:
        """Adds an entry to the queue."""
        heapq.heappush(self._queue, (time, next(self._order), kind, argument))

    def _on_start(self, now: float, index: int) -> None:
        """Starts a learner."""
        learner = _Learner(self._functions, index, next(self._sessions) * 1_000_000)
        self._learners[index] = learner
        self._advance(now, learner, None)

    def _on_stop(self, now: float, failure: Failure) -> None:
        """Ends a learner."""
        if self._learners.pop(failure.learner, None) is None:
            return
        for fragment in range(self._job.fragments):
            event = fragment, Leave(0.0, failure.learner)
            self._schedule(now + failure.detection, "event", event)
        if failure.recovery < math.inf:
            self._schedule(now + failure.recovery, "start", failure.learner)

    def _on_steps(self, now: float, learner: _Learner) -> None:
        """Continues a learner at the end of its local steps."""
        self._advance(now, learner, None)

    def _on_event(self, now: float, argument: tuple[int, Event]) -> None:
        """Applies an event to a syncer; its replies are sent after this time."""
        fragment, event = argument
        host = self._hosts[fragment]
        replies = host.apply(event._replace(time=now))
        self._undelivered += [(fragment, reply) for reply in replies]
        if now < host.state.deadline < math.inf:
            self._schedule(host.state.deadline, "event", (fragment, Tick(0.0)))

    def _on_answer(self, now: float, argument: tuple[int, Answer]) -> None:
        """Hands an answer to a learner, if it still has the membership."""
        fragment, answer = argument
        learner = self._learners.get(answer.reply.learner)
        if learner is None or not _belongs(learner, answer.reply):
            return
        learner.answers[fragment] = answer
        if learner.waiting == fragment:
            learner.waiting = None
            self._advance(now, learner, learner.answers.pop(fragment))

    def _deliver(self, now: float) -> None:
        """Sends the replies of this time, with the models after all its events."""
        undelivered, self._undelivered = self._undelivered, []
        for fragment, reply in undelivered:
            host = self._hosts[fragment]
            model = host.model() if reply.kind == "model" else None
            reply = reply._replace(version=host.state.version)
            arrival = now + self._clock.delay, fragment, Answer(reply, model)
            self._schedule(arrival[0], "answer", arrival[1:])

    def _advance(self, now: float, learner: _Learner, answer: Any) -> None:
        """Runs the program of a learner up to its next wait."""
        while self._learners.get(learner.index) is learner:
            try:
                effect = learner.program.send(answer)
            except StopIteration:
                del self._learners[learner.index]
                for fragment in range(self._job.fragments):
                    self._schedule(now, "event", (fragment, Leave(0.0, learner.index)))
                return
            answer = None
            if isinstance(effect, Steps):
                seconds = effect.count / self._speeds[learner.index]
                self._schedule(now + seconds, "steps", learner)
                return
            if isinstance(effect, Send):
                learner.session = getattr(effect.event, "session", learner.session)
                learner.answers.pop(effect.fragment, None)
                arrival = now + self._clock.delay
                self._schedule(arrival, "event", (effect.fragment, effect.event))
            elif isinstance(effect, Receive):
                answer = learner.answers.pop(effect.fragment, None)
                if answer is None:
                    learner.waiting = effect.fragment
                    return

    def _check_done(self) -> None:
        """Raises if rounds are left."""
        leases = self._hosts[0].state.leases
        if leases.returned or leases.next < leases.end:
            raise RuntimeError(
                "simulate(clock): every learner was lost before the job was done"
            )


def _writer(log: list | None, fragment: int):
    """Returns a function that appends events of a fragment to a log."""
    if log is None:
        return None
    return lambda event: log.append((fragment, event))


def _belongs(learner: _Learner, reply: Reply) -> bool:
    """Returns whether a reply is for the current membership of a learner."""
    return learner.session == reply.session


def _check_clock(clock: Clock) -> None:
    """Raises unless numbers of a clock are in range and failures are of learners."""
    call = "simulate(clock)"
    check_type(call, "clock", clock, Clock)
    check_int(call, "learners", clock.learners, 1)
    check_number(call, "delay", clock.delay, at_least=0)
    check_type(call, "failures", clock.failures, Sequence)
    for failure in clock.failures:
        check_type(call, "a failure", failure, Failure)
        check_int(call, "the learner", failure.learner, 0, clock.learners - 1)
        for name in ("time", "detection"):
            check_number(call, name, getattr(failure, name), at_least=0)
        if failure.recovery != math.inf:
            check_number(call, "recovery", failure.recovery, at_least=0)


def _per_learner(name: str, value: float | Sequence[float], count: int) -> list[float]:
    """Returns one number for each learner: a positive speed or any time of start."""
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise ValueError(
            f"simulate(clock): {name} must be a number or {count} numbers, got "
            f"{len(values)}"
        )
    call, above = "simulate(clock)", 0 if name == "speed" else None
    return [float(check_number(call, name, number, above=above)) for number in values]
