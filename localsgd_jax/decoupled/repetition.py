"""Repetition of a run from its events."""

from collections import Counter, deque
from collections.abc import Generator, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check_int, check_type, describe
from localsgd_jax.decoupled.events import Contribution, Event, Leave, Tick
from localsgd_jax.decoupled.fragments import join
from localsgd_jax.decoupled.history import History, history_columns
from localsgd_jax.decoupled.job import Job, check_job, shared_params
from localsgd_jax.decoupled.learner import (
    Answer,
    Receive,
    Send,
    learner_program,
    make_learner_functions,
)
from localsgd_jax.decoupled.syncer import make_syncer
from localsgd_jax.decoupled.syncer_host import SyncerHost

Log = Iterable[tuple[int, Event]]


def replay(job: Job, log: Log) -> tuple[PyTree, History]:
    """Repeats the merges of a run.

    Args:
      job: the job of the run.
      log: pairs of fragment and event, from `read_log` or from `simulate(log=...)`.

    Returns:
      Model and history of the run, with equal bits.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if an event belongs to a fragment that the job does not have.

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
      ...     every=2, steps=12, merge=decoupled.immediate())
      >>> log = []
      >>> params, history = decoupled.simulate(job, decoupled.Clock(2), log=log)
      >>> repeated, _ = decoupled.replay(job, log)
      >>> bool(repeated["w"] == params["w"])
      True
    """
    log = _checked_log("replay", job, log)
    hosts = [SyncerHost(make_syncer(job, f)) for f in range(job.fragments)]
    learners = 0
    for fragment, event in log:
        hosts[fragment].replay(event)
        learners = max(learners, 1 + getattr(event, "learner", -1))
    rows = [row for host in hosts for row in host.rows]
    rows.sort(key=lambda row: row["seconds"])
    params = join(shared_params(job), *(host.model() for host in hosts))
    return params, history_columns(rows, learners)


class Recomputed(NamedTuple):
    """Contributions of a run that were computed once more.

    Attributes:
      equal: number of contributions with equal bits.
      different: learner, fragment and number of each other one.
    """

    equal: int
    different: list[tuple[int, int, int]]


def recompute(job: Job, log: Log) -> Recomputed:
    """Repeats the local steps of a run in this process, in the order of its events.

    Only the order of the events of each fragment matters.

    Args:
      job: the job of the run.
      log: as for `replay`. It must not hold models read before the events of one time
        were complete, as those of `simulate` without delay.

    Returns:
      The comparison of each contribution with the one in the log.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if an event belongs to a fragment that the job does not have, or if
        the log lacks events, so that a learner waits.
    """
    log = _checked_log("recompute", job, log)
    queues: list[deque[Event]] = [deque() for _ in range(job.fragments)]
    for fragment, event in log:
        queues[fragment].append(event)
    repetition = _Repetition(job, queues)
    while any(queues):
        # The order between fragments may be unknown: an event waits for its learner.
        applied = [
            fragment
            for fragment, queue in enumerate(queues)
            if queue and repetition.apply(fragment, queue[0])
        ]
        if not applied:
            waiting = [queue[0] for queue in queues if queue]
            raise ValueError(
                "recompute(log): every event must follow from earlier ones, got "
                f"{describe(waiting)}"
            )
        for fragment in applied:
            queues[fragment].popleft()
    return Recomputed(repetition.equal, repetition.different)


class _Repetition:
    """Syncers and learners of a run that is repeated.

    A learner sends an event once more if its syncer was killed before it replied. It
    has received the reply to the last of these events only.

    Attributes:
      equal: as in `Recomputed`.
      different: as in `Recomputed`.
    """

    def __init__(self, job: Job, events: Sequence[Iterable[Event]]) -> None:
        """Makes the syncers; learners are made when they join.

        Args:
          job: the job of the run.
          events: events of each fragment, of which only the number of times is kept.
        """
        self._unsent = [Counter(map(_identity, queue)) for queue in events]
        self._sent: list[set[_Identity | None]] = [set() for _ in events]
        self._functions = make_learner_functions(job)
        self._hosts = [SyncerHost(make_syncer(job, f)) for f in range(job.fragments)]
        self._programs: dict[tuple[int, int], _Program] = {}
        self._last: dict[tuple, _Identity | None] = {}
        self.equal, self.different = 0, []

    def apply(self, fragment: int, event: Any) -> bool:
        """Repeats an event; returns whether its learner has come so far."""
        identity = _identity(event)
        is_new = identity not in self._sent[fragment]
        if is_new and not isinstance(event, Tick | Leave):
            sent: Any = self._program(event).next_event(fragment)
            if sent is None:
                return False
            if isinstance(event, Contribution):
                self._compare(fragment, sent, event)
            self._sent[fragment].add(identity)
            self._last[fragment, event.learner, event.session] = identity
        self._unsent[fragment][identity] -= 1
        host = self._hosts[fragment]
        for reply in host.replay(event):
            model = host.model() if reply.kind == "model" else None
            self._answer(fragment, Answer(reply, model))
        return True

    def _program(self, event: Any) -> "_Program":
        """Returns the program of the learner that has sent an event."""
        key = event.learner, event.session
        if key not in self._programs:
            self._programs[key] = _Program(learner_program(self._functions, *key))
        return self._programs[key]

    def _answer(self, fragment: int, answer: Answer) -> None:
        """Hands an answer to a learner unless it sends its event once more."""
        key = answer.reply.learner, answer.reply.session
        last = self._last.get((fragment, *key))
        if key in self._programs and not self._unsent[fragment][last]:
            self._programs[key].answers[fragment] = answer

    def _compare(self, fragment: int, sent: Any, logged: Contribution) -> None:
        """Compares a contribution with the one in the log."""
        if _equal(sent.payload, logged.payload):
            self.equal += 1
        else:
            self.different.append((logged.learner, fragment, logged.number))


_Identity = tuple[str, int, int, int]


def _checked_log(call: str, job: Job, log: Log) -> list[tuple[int, Event]]:
    """Returns the pairs of a log; raises unless each is a fragment and an event."""
    check_job(call, job)
    call = f"{call}(log)"
    check_type(call, "log", log, Iterable)
    pairs = list(log)
    for pair in pairs:
        is_pair = isinstance(pair, tuple) and len(pair) == 2
        if not (is_pair and isinstance(pair[1], Event)):
            text = "each element of the log must be a fragment and an event"
            raise TypeError(f"{call}: {text}, got {describe(pair)}")
        check_int(call, "the fragment", pair[0], 0, job.fragments - 1)
    return pairs


def _identity(event: Any) -> _Identity | None:
    """Returns kind, learner, session and number of an event; None for a Tick."""
    if isinstance(event, Tick | Leave):
        return None
    kind, number = type(event).__name__, getattr(event, "number", 0)
    return kind, event.learner, event.session, number


class _Program:
    """Program of a learner that advances from event to event.

    Attributes:
      answers: answer of each fragment that was not received yet.
    """

    def __init__(self, program: Generator[Any, Any, None]) -> None:
        """Stores the program and no answers."""
        self._program = program
        self._sent: dict[int, Event] = {}
        self._receiving: int | None = None
        self.answers: dict[int, Answer] = {}

    def next_event(self, fragment: int) -> Event | None:
        """Runs the program up to its next event for a fragment.

        Args:
          fragment: index of the fragment.

        Returns:
          The event; None if the program waits for an answer of another fragment.
        """
        while fragment not in self._sent:
            answer = None
            if self._receiving is not None:
                if self._receiving not in self.answers:
                    return None
                answer = self.answers.pop(self._receiving)
            effect = self._program.send(answer)
            self._receiving = effect.fragment if isinstance(effect, Receive) else None
            # Leaves are applied from the log, which also has those of lost learners.
            if isinstance(effect, Send) and not isinstance(effect.event, Leave):
                self._sent[effect.fragment] = effect.event
        return self._sent.pop(fragment)


def _equal(first: PyTree, second: PyTree) -> bool:
    """Returns whether two payloads have equal bits."""
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves)
