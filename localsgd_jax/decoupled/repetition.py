"""Repetition of a run from its events."""

from collections.abc import Generator, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from localsgd_jax.core.types import PyTree
from localsgd_jax.decoupled.events import Contribution, Event, Leave, Tick
from localsgd_jax.decoupled.fragments import join
from localsgd_jax.decoupled.history import History, history_columns
from localsgd_jax.decoupled.job import Job, shared_params
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

    Args:
      job: the job of the run.
      log: as for `replay`. It must not hold models read before the events of one time
        were complete, as those of `simulate` without delay.

    Returns:
      The comparison of each contribution with the one in the log.
    """
    functions = make_learner_functions(job)
    hosts = [SyncerHost(make_syncer(job, f)) for f in range(job.fragments)]
    programs: dict[tuple[int, int], _Program] = {}
    equal, different = 0, []
    event: Any
    for fragment, event in log:
        if not isinstance(event, Tick | Leave):
            key = event.learner, event.session
            if key not in programs:
                programs[key] = _Program(learner_program(functions, *key))
            sent: Any = programs[key].next_event(fragment)
            if isinstance(event, Contribution):
                same = _equal(sent.payload, event.payload)
                equal += same
                if not same:
                    different.append((event.learner, fragment, event.number))
        for reply in hosts[fragment].replay(event):
            model = hosts[fragment].model() if reply.kind == "model" else None
            if program := programs.get((reply.learner, reply.session)):
                program.answers[fragment] = Answer(reply, model)
    return Recomputed(equal, different)


class _Program:
    """Program of a learner that advances from event to event."""

    def __init__(self, program: Generator[Any, Any, None]) -> None:
        """Stores the program and no answers."""
        self._program = program
        self.answers: dict[int, Answer] = {}

    def next_event(self, fragment: int) -> Event:
        """Runs the program up to its next event for a fragment."""
        answer: Any = None
        while True:
            effect = self._program.send(answer)
            answer = None
            if isinstance(effect, Receive):
                answer = self.answers.pop(effect.fragment)
            elif isinstance(effect, Send) and effect.fragment == fragment:
                return effect.event


def _equal(first: PyTree, second: PyTree) -> bool:
    """Returns whether two payloads have equal bits."""
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves)
