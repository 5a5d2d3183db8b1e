"""Program of a learner, independent of clock and transport.

It is a generator. It yields `Send`, `Receive` and `Steps`, which a virtual clock, an
event log or Ray carries out.
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.core.pytrees import promote, ravel
from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import MAX_INT64, check_number, check_type
from localsgd_jax.decoupled import events
from localsgd_jax.decoupled.events import Reply
from localsgd_jax.decoupled.fragments import Fragment, difference, join, split
from localsgd_jax.decoupled.job import Job, steps_per_contribution
from localsgd_jax.decoupled.payload import encode_update
from localsgd_jax.decoupled.trainer import Trainer, make_trainer


class Send(NamedTuple):
    """Sends an event to the syncer of a fragment; the sender sets its time."""

    fragment: int
    event: events.Event


class Receive(NamedTuple):
    """Waits for the `Answer` to the last event sent to the syncer of a fragment."""

    fragment: int


class Steps(NamedTuple):
    """Local steps that the learner is about to take."""

    count: int


class Answer(NamedTuple):
    """Reply of a syncer, with the leaves of the fragment if its kind is "model"."""

    reply: Reply
    model: dict[str, np.ndarray] | None = None


class LearnerFunctions(NamedTuple):
    """Compiled functions of a learner; made once per process.

    Attributes:
      job: the job.
      trainer: local computation.
      encode: `encode(params, last_read, error) -> (payload, error)`.
      merge: `merge(params, sent, model) -> params`, x + (z − sent).
    """

    job: Job
    trainer: Trainer
    encode: Callable
    merge: Callable


class _Progress(NamedTuple):
    """Variables of a membership; tuples have an entry for each fragment.

    Attributes:
      train: train state.
      last_read: r, leaves of the model that was last received.
      sent: leaves of the parameters at the last contribution.
      errors: error feedback of the codec.
      versions: number of merges in `last_read`.
      numbers: number of the last contribution.
      work: records of the dispatches since the last contribution.
    """

    train: PyTree
    last_read: tuple[Fragment, ...]
    sent: tuple[Fragment, ...]
    errors: tuple[jax.Array, ...]
    versions: tuple[int, ...]
    numbers: tuple[int, ...]
    work: tuple["_Work", ...] = ()


class _Work(NamedTuple):
    """Local steps of a dispatch: their number, contents and metrics."""

    steps: int
    examples: int
    tokens: int
    metrics: dict[str, np.ndarray]


class _Rejoin(Exception):
    """A syncer has ended the membership."""


def make_learner_functions(job: Job) -> LearnerFunctions:
    """Compiles the functions of a learner."""

    @jax.jit
    def encode(params: Fragment, last_read: Fragment, error: jax.Array) -> tuple:
        update = ravel(difference(params, last_read))
        return encode_update(job.compress, update, error)

    @jax.jit
    def merge(params: Fragment, sent: Fragment, model: Fragment) -> Fragment:
        # x − sent is the progress since the contribution; it is sent in the next one.
        progress = difference(params, sent)
        return jax.tree.map(
            lambda z, d: (z.astype(d.dtype) + d).astype(z.dtype), model, progress
        )

    return LearnerFunctions(job, make_trainer(job), encode, merge)


def learner_program(
    functions: LearnerFunctions, learner: int, session: int
) -> Generator[Send | Receive | Steps, Any, None]:
    """Runs a learner until the job is done.

    Args:
      functions: from `make_learner_functions`.
      learner: index of the learner.
      session: number of its first membership; further ones add 1.

    Yields:
      Effects. A `Receive` is resumed with an `Answer`.
    """
    for current in itertools.count(session):
        try:
            yield from _membership(functions, learner, current)
            return
        except _Rejoin:
            continue


def _membership(
    functions: LearnerFunctions, learner: int, session: int
) -> Generator[Send | Receive | Steps, Any, None]:
    """Joins all syncers and computes rounds until the job is done."""
    job, batches = functions.job, _BatchReader(functions.job, learner)
    key, length = (0.0, learner, session), steps_per_contribution(job)
    progress, leases = yield from _join(functions, key)
    in_flight: tuple[int, ...] = ()  # Fragments in the order of their contributions.
    while True:
        while not leases and in_flight:
            first, *others = in_flight
            progress, reply = yield from _receive(functions, progress, first)
            leases, in_flight = reply.leases if first == 0 else (), tuple(others)
        if not leases:
            yield from _request(job, key)
            return
        current, leases = leases[0], leases[1:]
        for index in range(job.fragments):
            fragment, ahead = (index + 1) % job.fragments, 0
            if in_flight and len(in_flight) >= job.exchanges:
                ahead = job.overlap
                rows = batches.read(current, ahead)
                progress = yield from _train(functions, progress, rows)
                first, *others = in_flight
                progress, reply = yield from _receive(functions, progress, first)
                in_flight = tuple(others)
                if first == 0:
                    leases = tuple(x for x in reply.leases if x != current)
            rows = batches.read(current, length - ahead)
            progress = yield from _train(functions, progress, rows)
            progress = yield from _send(functions, progress, fragment, key)
            in_flight = (*in_flight, fragment)
            if not job.overlap:
                progress, reply = yield from _receive(functions, progress, fragment)
                leases = reply.leases if fragment == 0 else leases
                in_flight = ()


def _join(
    functions: LearnerFunctions, key: tuple
) -> Generator[Send | Receive, Any, tuple[_Progress, tuple[int, ...]]]:
    """Joins all syncers; returns the start of a membership and its leases."""
    job, answers = functions.job, []
    for fragment in range(job.fragments):
        yield Send(fragment, events.Join(*key))
        answers.append(_checked((yield Receive(fragment))))
    train = functions.trainer.init(key[1])
    models = [answer.model if answer.model is not None else {} for answer in answers]
    params = join(functions.trainer.read(train), *models)
    train = functions.trainer.write(train, params)
    parts = tuple(split(params, job.fragments))
    errors = tuple(jnp.zeros_like(ravel(promote(part))) for part in parts)
    versions = tuple(answer.reply.version for answer in answers)
    progress = _Progress(train, parts, parts, errors, versions, (0,) * job.fragments)
    return progress, answers[0].reply.leases


def _train(
    functions: LearnerFunctions, progress: _Progress, batches: list
) -> Generator[Steps, Any, _Progress]:
    """Takes local steps; yields their number before."""
    if not batches:
        return progress
    yield Steps(len(batches))
    train, metrics = functions.trainer.steps(progress.train, batches)
    count_tokens = functions.job.tokens or count_examples
    work = _Work(
        len(batches),
        sum(count_examples(batch) for batch in batches),
        sum(_checked_count(count_tokens(batch)) for batch in batches),
        {name: np.asarray(value) for name, value in metrics.items()},
    )
    return progress._replace(train=train, work=(*progress.work, work))


def _checked_count(tokens: Any) -> int:
    """Returns the number of tokens of a batch; raises unless it is one."""
    call, largest = "Job(tokens)", MAX_INT64
    return int(check_number(call, "the count", tokens, at_least=0, at_most=largest))


def _send(
    functions: LearnerFunctions, progress: _Progress, fragment: int, key: tuple
) -> Generator[Send, Any, _Progress]:
    """Sends the update of a fragment."""
    params = functions.trainer.read(progress.train)
    part = split(params, functions.job.fragments)[fragment]
    payload, error = functions.encode(
        part, progress.last_read[fragment], progress.errors[fragment]
    )
    number = progress.numbers[fragment] + 1
    work = progress.work
    means = {
        name: float(np.mean(np.concatenate([item.metrics[name] for item in work])))
        for name in work[0].metrics
    }
    time, learner, session = key
    event = events.Contribution(
        time,
        learner,
        session,
        number,
        progress.versions[fragment],
        jax.tree.map(np.asarray, payload),
        sum(item.steps for item in work),
        sum(item.examples for item in work),
        sum(item.tokens for item in work),
        means,
    )
    yield Send(fragment, event)
    return progress._replace(
        sent=_with_item(progress.sent, fragment, part),
        errors=_with_item(progress.errors, fragment, error),
        numbers=_with_item(progress.numbers, fragment, number),
        work=(),
    )


def _receive(
    functions: LearnerFunctions, progress: _Progress, fragment: int
) -> Generator[Receive, Any, tuple[_Progress, Reply]]:
    """Receives the model of a fragment and adds the progress since its update."""
    answer = _checked((yield Receive(fragment)))
    if answer.model is None:
        return progress, answer.reply
    params = functions.trainer.read(progress.train)
    part = split(params, functions.job.fragments)[fragment]
    model = {path: jnp.asarray(leaf) for path, leaf in answer.model.items()}
    merged = functions.merge(part, progress.sent[fragment], model)
    train = functions.trainer.write(progress.train, join(params, merged))
    progress = progress._replace(
        train=train,
        last_read=_with_item(progress.last_read, fragment, model),
        versions=_with_item(progress.versions, fragment, answer.reply.version),
    )
    return progress, answer.reply


def _request(job: Job, key: tuple) -> Generator[Send | Receive, Any, None]:
    """Waits until the job is done; raises _Rejoin if there are rounds again."""
    # The other syncers must not wait for contributions of an idle learner.
    for fragment in range(1, job.fragments):
        yield Send(fragment, events.Leave(*key))
    yield Send(0, events.Request(*key))
    answer = yield Receive(0)
    if answer.reply.kind != "done":
        raise _Rejoin


def _checked(answer: Answer) -> Answer:
    """Returns an answer; raises _Rejoin if the membership has ended."""
    if answer.reply.kind == "rejoin":
        raise _Rejoin
    return answer


def _with_item(items: tuple, index: int, item: Any) -> tuple:
    """Replaces one item of a tuple."""
    return (*items[:index], item, *items[index + 1 :])


def count_examples(batch: PyTree) -> int:
    """Returns the number of examples of a batch with leaves `(K, B, ...)` or `(K,)`."""
    return math.prod(np.shape(jax.tree.leaves(batch)[0])[:2])


class _BatchReader:
    """Batches of leases; consecutive leases are read from one iterator."""

    def __init__(self, job: Job, learner: int) -> None:
        """Stores the job."""
        self._job, self._learner = job, learner
        self._lease: int | None = None
        self._next, self._iterator = -1, iter(())

    def read(self, lease: int, count: int) -> list[PyTree]:
        """Returns the next batches of a lease.

        Args:
          lease: index of the first batch of the round.
          count: number of batches.

        Raises:
          ValueError: if the iterator has fewer.
        """
        if lease != self._lease:
            if lease != self._next:
                batches = self._job.batches(self._learner, lease)
                check_type("Job(batches)", "its result", batches, Iterable)
                self._iterator: Iterator = iter(batches)
            self._lease, self._next = lease, lease + self._job.every
        rows = list(itertools.islice(self._iterator, count))
        if len(rows) < count:
            raise ValueError(
                f"Job(batches): batches({self._learner}, {lease}) must yield at least "
                f"{self._job.every} batches, got fewer"
            )
        return rows
