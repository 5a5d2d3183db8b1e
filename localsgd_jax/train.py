"""The host loop: feeds rounds to the devices, watches the loss, keeps a history."""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax import agreement, checks, processes, rounds, schedules
from localsgd_jax.adaptive import Adaptive
from localsgd_jax.base import Cluster, PyTree, State
from localsgd_jax.feed import Convoy
from localsgd_jax.journal import History, Journal, notes, open_bar
from localsgd_jax.traffic import Span, Traffic


def train(
    cluster: Cluster,
    state: State,
    batches: Iterable[PyTree],
    *,
    every: int | Callable,
    steps: int | None = None,
    weight: jax.Array | None = None,
    evaluate: Callable | None = None,
    evaluate_every: int = 1,
    field: str | Sequence[str] | None = "params",
    record: Callable | None = None,
    save: Callable | None = None,
    save_every: int = 1000,
    progress: bool | None = None,
    chunk: int = 64,
) -> tuple[State, History]:
    """Trains until the batches or the steps end, and synchronises at the end.

    Rounds of equal length run fused, several in one dispatch; where the schedule is
    irregular the steps are gated. While the devices compute, the host loads, stacks
    and transfers the next batches; at most two dispatches are under way. A last
    incomplete round is trained and synchronised. The state given is donated: use the
    one returned.

    Args:
      cluster: where the workers live.
      state: from `cluster.init`, or from an earlier run.
      batches: any iterable of batches, leaves `(K, B, ...)`, such as `deal(...)`; of
        several processes all end with the one whose batches end first, as in `zip`.
      every: a period or a schedule, called with the number of local updates.
      steps: local steps to do at most; None for all batches.
      weight: `(K,)` shares in every mean.
      evaluate: from the consensus model to a number or a dict of numbers.
      evaluate_every: rounds whose number is a multiple of it are evaluated, and the
        last one.
      field: what `evaluate` gets, as in `consensus`, such as `("params",
        "batch_stats")`.
      record: called with each row of the history, a dict, as soon as it is known.
      save: called with the state, and with the examples used since the call began,
        such as `Checkpoints.save`: where `state.step` is a multiple of `save_every`,
        also within a round, and at the end. It must copy what it wants to keep.
      save_every: local steps from one call of `save` to the next; a multiple of the
        period leaves the rounds whole.
      progress: whether to show a progress bar; None: if tqdm is installed.
      chunk: most local steps in one dispatch.

    Returns:
      The state and the history: NumPy columns with an entry for each round. "step" and
      "round" at its end; since this call began "seconds", compilation included, "bytes"
      that each worker sent, as if it had a link of its own, and, on a mesh with places
      for several, "device_bytes" that each device sent, read out of the programs that
      ran as `ledger` does; the mean over the round of every metric that is one number
      for each worker, such as "loss"; what rules note, such as "left_out" of `guard`;
      and what `evaluate` gave, NaN for
      rounds that were not evaluated.

    Raises:
      NonFiniteLossError: when the metric "loss" of a worker is NaN or infinite; it
        carries the history so far.
      JobError: if several processes are about to do different things, batches of one
        have other shapes or fail, or one does not come.
      ValueError: if an argument is out of range or a batch does not have K shares.
      TypeError: if batches differ in structure, or `every` is no schedule.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5),
      ...                            rule=lsgd.average())
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> state = cluster.init(jnp.zeros(()))
      >>> batches = [jnp.array([1.0, 3.0])] * 5
      >>> state, history = train(cluster, state, batches, every=2, progress=False)
      >>> history["step"], history["bytes"]
      (array([2, 4, 5]), array([ 4,  8, 12]))
    """
    schedule = every if callable(every) else schedules.every(every)
    _check(evaluate_every=evaluate_every, chunk=chunk, save_every=save_every)
    if steps is not None:
        checks.integer("train(steps)", "steps", steps, 0)
    look_every = evaluate_every if evaluate else math.inf
    run = _dispatcher(cluster, weight, traffic := Traffic(state))
    journal = Journal(cluster, state, evaluate, field, record)
    queue = Convoy(islice(batches, steps), cluster.put, chunk, journal.holders)
    start, examples, computing = int(state.step), 0, None
    # Counted from the first round of all, so that a run that was interrupted looks,
    # saves and cuts its dispatches where it would have done without.
    until_look = look_every - journal.round % look_every
    told = (schedule, steps, weight, look_every, save and save_every, chunk)
    _compare(cluster, state, queue, journal, told)
    with open_bar(journal.leads and progress, steps, batches) as journal.bar:
        while limit := queue.ready():
            if save:
                limit = min(limit, save_every - start % save_every)
            limit = _steps_to_look(schedule, start, limit, until_look)
            segment = plan(schedule, start, limit, chunk)
            due = [bool(schedule(start + i + 1)) for i in range(segment.steps)]
            state, *seen = run(segment, state, taken := queue.pop(segment.steps), due)
            # One dispatch computes while the host reads the metrics of the one before
            # and loads the next: never more than two are queued.
            journal.read(computing, state)
            _teach(schedule, journal, start + segment.steps)
            start, until_look = start + segment.steps, until_look - sum(due)
            computing, examples = (due, *seen), examples + _count(taken)
            if not until_look:
                journal.read(computing, state)
                journal.look(state)
                until_look, computing = look_every, None
            if save and start % save_every == 0 and queue.ready():
                journal.read(computing, state, last=True)  # Saves no NaN.
                save(state, examples)
                computing = None
        journal.read(computing, state, last=True)
        if journal.unfinished:
            state, span = _last_sync(cluster, traffic, state, weight)
            journal.end_round(notes(state), span)
        journal.look(state)
    if save and examples:
        save(state, examples)
    return state, journal.history()


def _check(**numbers: int) -> None:
    """Refuses arguments below 1."""
    for name, value in numbers.items():
        checks.integer(f"train({name})", name, value, 1)


class Segment(NamedTuple):
    """Local steps that go to the devices in one dispatch.

    Attributes:
      steps: how many.
      period: they are whole rounds of this length; None: gated, step by step.
    """

    steps: int
    period: int | None


def plan(schedule: Callable, start: int, limit: int, chunk: int) -> Segment:
    """Chooses the next dispatch so that few different programs are compiled.

    Where the schedule is regular: as many whole rounds as fit into a chunk, or one.
    Elsewhere: a chunk of gated steps, or one.

    Args:
      schedule: when workers agree.
      start: local updates done.
      limit: steps that may be taken before the host must look.
      chunk: most steps in one dispatch.

    Returns:
      A segment of at most `limit` steps.

    Example:
      >>> from localsgd_jax import schedules
      >>> plan(schedules.every(4), 8, limit=64, chunk=10)
      Segment(steps=8, period=4)
      >>> plan(schedules.at([3, 5]), 0, limit=64, chunk=10)
      Segment(steps=10, period=None)
    """

    def regular(period: int, steps: int) -> bool:
        return all(
            bool(schedule(start + i)) == (i % period == 0) for i in range(1, steps + 1)
        )

    most = min(limit, chunk)
    period = next((i for i in range(1, most + 1) if schedule(start + i)), None)
    if period and regular(period, 2 * period):
        many = chunk // period * period
        fits = many <= limit and regular(period, many)
        return Segment(many if fits else period, period)
    return Segment(chunk if chunk <= limit else 1, None)


def _dispatcher(
    cluster: Cluster, weight: jax.Array | None, traffic: Traffic
) -> Callable:
    """Makes the function that sends a segment to the devices."""
    one_round = rounds.fused(cluster)

    @partial(jax.jit, donate_argnums=0, static_argnames="period")
    def fused(state: State, batches: PyTree, period: int) -> tuple[State, PyTree]:
        nested = jax.tree.map(lambda x: x.reshape(-1, period, *x.shape[1:]), batches)

        def turn(state: State, batches: PyTree) -> tuple[State, tuple]:
            state, metrics = one_round(state, batches, weight)
            return state, (metrics, notes(state))

        state, (metrics, noted) = jax.lax.scan(turn, state, nested)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), metrics)
        each_step = jax.tree.map(lambda x: jnp.repeat(x, period), noted)
        return state, (_by_name(flat), each_step)

    @partial(jax.jit, donate_argnums=0)
    def gated(state: State, batches: PyTree, due: jax.Array) -> tuple[State, PyTree]:
        def step(state: State, turn: tuple) -> tuple[State, PyTree]:
            batch, now = turn
            state, metrics = cluster.step(state, batch)
            state = cluster.sync_if(now, state, weight)
            return state, (metrics, notes(state))

        state, (metrics, noted) = jax.lax.scan(step, state, (batches, due))
        return state, (_by_name(metrics), noted)

    def run(
        segment: Segment, state: State, batches: PyTree, due: list[bool]
    ) -> tuple[State, PyTree, Span | None]:
        if period := segment.period:
            count = segment.steps // period
            span = traffic.of(fused, state, batches, rounds=count, period=period)
            return *fused(state, batches, period=period), span
        args = state, batches, np.array(due)
        span = traffic.of(gated, *args, rounds=None)
        return *gated(*args), span

    return run


def _last_sync(
    cluster: Cluster, traffic: Traffic, state: State, weight: jax.Array | None
) -> tuple[State, Span | None]:
    """Ends an incomplete round."""
    sync = jax.jit(cluster.sync, donate_argnums=0)
    span = traffic.of(sync, state, weight, rounds=1)
    return sync(state, weight), span


def _compare(
    cluster: Cluster, state: State, queue: Convoy, journal: Journal, settings: tuple
) -> None:
    """Makes sure that all processes are about to do the same."""
    if len(journal.holders) == 1:
        return
    queue.ready()
    batch = None if (first := queue.first()) is None else cluster.put(first)
    names = ("every", "steps", "weight", "evaluate_every", "save_every", "chunk")
    programs = {
        "local step": (cluster.step, batch),
        "sync": (cluster.sync, settings[2]),
    }
    schedule, *rest, chunk = settings
    told = (_beats(schedule, journal.step, chunk), *rest, chunk)
    facts = {
        **dict(zip(names, map(str, told), strict=True)),
        "state": {"step": journal.step, "round": journal.round},
        "leaves": processes.described(state),
        "batch": processes.described(batch),
        "program": {
            name: _checksum(jax.jit(function).lower(state, argument).as_text())
            for name, (function, argument) in programs.items()
            if batch is not None
        },
    }
    agreement.same("train()", facts, journal.holders)


def _beats(schedule: Callable, start: int, chunk: int) -> Callable | list[int]:
    """Returns what tells schedules apart: a name, or the next beats of a function.

    The text of a function has its address in it, which differs between processes.
    """
    if isinstance(schedule, schedules.Schedule):
        return schedule
    return [step for step in range(start + 1, start + chunk + 1) if schedule(step)]


def _checksum(text: str) -> str:
    """Returns what tells texts apart."""
    return f"checksum {zlib.crc32(text.encode()):08x}"


def _teach(schedule: Callable, journal: Journal, step: int) -> None:
    """Tells an adaptive schedule the rounds that it does not know yet."""
    if isinstance(schedule, Adaptive):
        for row in journal.news():
            schedule.learn(row, step)


def _by_name(metrics: PyTree) -> dict[str, jax.Array]:
    """Returns the metrics that are one number per worker: (H, K) by name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=".") or "loss": leaf
        for path, leaf in jax.tree.leaves_with_path(metrics)
        if leaf.ndim == 2
    }


def _count(batches: PyTree) -> int:
    """Returns the number of examples in batches with leaves (H, K, B, ...)."""
    return math.prod(np.shape(jax.tree.leaves(batches)[0])[:3])


def _steps_to_look(
    schedule: Callable, start: int, limit: int, until_look: float
) -> int:
    """Returns the steps until so many rounds have ended, at most `limit`."""
    ended = 0
    for steps in range(1, limit + 1):
        ended += bool(schedule(start + steps))
        if ended == until_look:
            return steps
    return limit
