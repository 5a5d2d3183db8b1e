"""Syncer of a fragment: a pure function from state and event to state and replies."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.asynchronous.aggregation import UpdateContext
from localsgd_jax.core.pytrees import promote, unravel
from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check_int
from localsgd_jax.decoupled.events import (
    Contribution,
    Event,
    Join,
    Leave,
    Output,
    Reply,
    Request,
    Tick,
)
from localsgd_jax.decoupled.fragments import Fragment, split
from localsgd_jax.decoupled.job import Job, check_job, shared_params
from localsgd_jax.decoupled.leases import Leases, return_leases, take_lease
from localsgd_jax.decoupled.merging import Counts, add_weighted
from localsgd_jax.decoupled.payload import decode_update, payload_bytes
from localsgd_jax.decoupled.syncer_state import (
    Member,
    Pending,
    SyncerState,
    Totals,
    is_done,
)

_GAIN = 0.25  # Share of the last interval in the running means of arrivals.


class Syncer(NamedTuple):
    """Functions of the syncer of a fragment.

    Attributes:
      init: `init() -> SyncerState`.
      step: `step(state, event) -> (state, Output)`; without clock or communication.
      model: `model(state) -> leaves` by path in the dtypes of the job, NumPy arrays.
    """

    init: Callable[[], SyncerState]
    step: Callable[[SyncerState, Event], tuple[SyncerState, Output]]
    model: Callable[[SyncerState], dict[str, np.ndarray]]


class _Arithmetic(NamedTuple):
    """Compiled operations on the arrays of a state, and constants of the job."""

    fragment: int
    job: Job
    accumulate: Callable
    apply: Callable
    model_bytes: int


def make_syncer(job: Job, fragment: int = 0) -> Syncer:
    """Makes the syncer of a fragment.

    Args:
      job: description of the job.
      fragment: index of the fragment. The syncer of fragment 0 also gives out leases.

    Returns:
      Its functions. Equal events give bitwise equal states.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if there is no such fragment.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> from localsgd_jax import decoupled
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.1),
      ...                            rule=lsgd.average())
      >>> job = decoupled.Job(algorithm, {"w": jnp.zeros(())}, lambda k, start: [],
      ...                     every=2, steps=4, merge=decoupled.immediate())
      >>> syncer = decoupled.make_syncer(job)
      >>> state, output = syncer.step(syncer.init(), decoupled.Join(0.0, 3, session=1))
      >>> output.replies[0].kind, output.replies[0].leases
      ('model', (0,))
    """
    check_job("make_syncer", job)
    check_int("make_syncer(fragment)", "it", fragment, 0, job.fragments - 1)
    like = split(shared_params(job), job.fragments)[fragment]
    aggregation = job.merge.aggregation(job.outer)
    leases = Leases(0, math.ceil(job.steps / job.every) * job.every, job.every)

    def init() -> SyncerState:
        params = promote(like)
        zeros = jax.tree.map(jnp.zeros_like, params)
        state = aggregation.init(params)
        return SyncerState(params, state, zeros, 0, {}, (), math.inf, leases, Totals())

    @jax.jit
    def accumulate(total: Fragment, payload: PyTree, weight: Any) -> tuple:
        size = sum(x.size for x in jax.tree.leaves(total))
        update = unravel(decode_update(job.compress, payload, size), total)
        return add_weighted(total, update, weight)

    @functools.partial(jax.jit, static_argnums=5)
    def apply(params, state, total, weight, staleness, workers) -> tuple:
        mean = jax.tree.map(lambda t: t / weight, total)
        context = UpdateContext(workers, staleness)
        params, state = aggregation.apply(params, mean, state, context)
        return params, state, jax.tree.map(jnp.zeros_like, total)

    def model(state: SyncerState) -> dict[str, np.ndarray]:
        return {
            path: np.asarray(leaf.astype(jnp.result_type(like[path])))
            for path, leaf in state.params.items()
        }

    size = sum(jnp.size(x) * jnp.result_type(x).itemsize for x in like.values())
    arithmetic = _Arithmetic(fragment, job, accumulate, apply, size)
    return Syncer(init, functools.partial(_step, arithmetic), model)


def _step(
    arithmetic: _Arithmetic, state: SyncerState, event: Event
) -> tuple[SyncerState, Output]:
    """Handles an event, then merges if it is time to."""
    handlers: dict[type, Callable] = {
        Join: _on_join,
        Leave: _on_leave,
        Request: _on_request,
        Contribution: _on_contribution,
        Tick: lambda arithmetic, state, event: (state, ()),
    }
    state, replies = handlers[type(event)](arithmetic, state, event)
    state, merged, rows = _merge_if_due(arithmetic, state, event.time)
    state, waiting = _answer_requests(arithmetic, state)
    replies = (*replies, *merged, *waiting)
    sent = arithmetic.model_bytes * sum(reply.kind == "model" for reply in replies)
    totals = state.totals._replace(bytes_sent=state.totals.bytes_sent + sent)
    return state._replace(totals=totals), Output(replies, rows)


def _on_join(
    arithmetic: _Arithmetic, state: SyncerState, event: Join
) -> tuple[SyncerState, tuple[Reply, ...]]:
    """Adds a member, in place of its previous membership."""
    current = state.members.get(event.learner)
    if current is not None and current.session != event.session:
        state, _ = _on_leave(arithmetic, state, Leave(event.time, event.learner))
        current = None
    if current is None:
        state = _with_member(state, event.learner, Member(event.session, 0, event.time))
        state = _take_leases(arithmetic, state, event.learner)
    return state, (_reply(state, event.learner),)


def _on_leave(
    arithmetic: _Arithmetic, state: SyncerState, event: Leave
) -> tuple[SyncerState, tuple[Reply, ...]]:
    """Removes a member and frees its leases."""
    member = state.members.get(event.learner)
    if member is None or event.session not in (None, member.session):
        return state, ()
    members = {k: m for k, m in state.members.items() if k != event.learner}
    leases = return_leases(state.leases, member.leases)
    return state._replace(members=members, leases=leases), ()


def _on_request(
    arithmetic: _Arithmetic, state: SyncerState, event: Request
) -> tuple[SyncerState, tuple[Reply, ...]]:
    """Notes that a member needs leases; `_answer_requests` replies."""
    member = state.members.get(event.learner)
    if member is None or member.session != event.session:
        return state, (_rejoin(state, event),)
    return _with_member(state, event.learner, member._replace(waiting=True)), ()


def _on_contribution(
    arithmetic: _Arithmetic, state: SyncerState, event: Contribution
) -> tuple[SyncerState, tuple[Reply, ...]]:
    """Adds a contribution to the pending ones, unless it is not valid."""
    totals, member = state.totals, state.members.get(event.learner)
    size = payload_bytes(event.payload)
    totals = totals._replace(bytes_received=totals.bytes_received + size)
    if member is None or member.session != event.session:
        totals = totals._replace(rejected=totals.rejected + 1)
        return state._replace(totals=totals), (_rejoin(state, event),)
    if event.number <= member.number:
        totals = totals._replace(duplicates=totals.duplicates + 1)
        is_pending = any(p.learner == event.learner for p in state.pending)
        replies = () if is_pending else (_reply(state, event.learner),)
        return state._replace(totals=totals), replies
    member = _after_arrival(member, event)._replace(leases=member.leases[1:])
    state = _with_member(state._replace(totals=totals), event.learner, member)
    state = _take_leases(arithmetic, state, event.learner)
    pending = _pending(arithmetic, state, event)
    total, finite = arithmetic.accumulate(
        state.total, event.payload, np.float32(pending.weight)
    )
    if not finite:
        totals = totals._replace(not_finite=totals.not_finite + 1)
        return state._replace(totals=totals), (_rejoin(state, event),)
    return state._replace(total=total, pending=(*state.pending, pending)), ()


def _merge_if_due(
    arithmetic: _Arithmetic, state: SyncerState, now: float
) -> tuple[SyncerState, tuple[Reply, ...], tuple[dict, ...]]:
    """Merges the pending contributions if the policy says so."""
    arrivals = [pending.time for pending in state.pending]
    predicted = _predicted_arrivals(arithmetic, state)
    deadline = arithmetic.job.merge.deadline(arrivals, *predicted)
    if deadline > now:
        return state._replace(deadline=deadline), (), ()
    row = _history_row(arithmetic, state, now)
    state = _apply(arithmetic, state)
    current = [p.learner for p in state.pending if _is_current(state, p)]
    state = _with_read_times(state, current, now)
    replies = [_reply(state, learner) for learner in current]
    state = state._replace(pending=(), deadline=math.inf)
    return state, tuple(replies), (row,)


def _predicted_arrivals(
    arithmetic: _Arithmetic, state: SyncerState
) -> tuple[list[float], list[float]]:
    """Predicts the arrivals of members without a pending contribution.

    Args:
      arithmetic: constants of the job.
      state: state of the syncer.

    Returns:
      Times of the members that have contributed before, and of the others, which may
      compile: twice the interval of the slowest member after they joined.
    """
    arrived = {pending.learner for pending in state.pending}
    missing = [
        member
        for learner, member in state.members.items()
        if learner not in arrived and (member.leases or arithmetic.fragment)
    ]
    known = [m for m in state.members.values() if not math.isnan(m.interval)]
    slowest = max(map(_longest_interval, known), default=math.inf)
    expected = [
        m.read_time + _longest_interval(m)
        for m in missing
        if not math.isnan(m.interval)
    ]
    joining = [m.read_time + 2 * slowest for m in missing if math.isnan(m.interval)]
    return expected, joining


def _longest_interval(member: Member) -> float:
    """Returns the mean interval of a member plus twice its deviation."""
    return member.interval + 2 * member.deviation


def _apply(arithmetic: _Arithmetic, state: SyncerState) -> SyncerState:
    """Applies the mean of the pending updates to the model."""
    weight = sum(pending.weight for pending in state.pending)
    workers = arithmetic.job.merge.num_workers(len(state.members))
    staleness = max(pending.staleness for pending in state.pending)
    params, aggregation_state, total = arithmetic.apply(
        state.params,
        state.aggregation_state,
        state.total,
        np.float32(weight if weight > 0 else 1),
        np.int32(staleness),
        workers,
    )
    counts = [pending.counts for pending in state.pending]
    totals = state.totals._replace(
        steps=state.totals.steps + sum(c.steps for c in counts),
        examples=state.totals.examples + sum(c.examples for c in counts),
        tokens=state.totals.tokens + sum(c.tokens for c in counts),
    )
    return state._replace(
        params=params,
        aggregation_state=aggregation_state,
        total=total,
        version=state.version + 1,
        totals=totals,
    )


def _history_row(arithmetic: _Arithmetic, state: SyncerState, now: float) -> dict:
    """Returns the row of the merge that is about to happen."""
    pending, totals = state.pending, state.totals
    steps = [p.counts.steps for p in pending]
    names = dict.fromkeys(name for p in pending for name in p.metrics)
    values = {n: [p.metrics.get(n, math.nan) for p in pending] for n in names}
    means = {n: float(np.average(x, weights=steps)) for n, x in values.items()}
    return {
        "merge": state.version + 1,
        "fragment": arithmetic.fragment,
        "seconds": now,
        "learners": tuple(p.learner for p in pending),
        "members": len(state.members),
        "steps": totals.steps + sum(steps),
        "tokens": totals.tokens + sum(p.counts.tokens for p in pending),
        "staleness": max(p.staleness for p in pending),
        "wait": now - min(p.time for p in pending),
        "bytes_received": totals.bytes_received,
        "bytes_sent": totals.bytes_sent,
        "reissued": state.leases.reissued,
        "not_finite": totals.not_finite,
        "duplicates": totals.duplicates,
        "rejected": totals.rejected,
        **means,
    }


def _answer_requests(
    arithmetic: _Arithmetic, state: SyncerState
) -> tuple[SyncerState, tuple[Reply, ...]]:
    """Answers members that wait for leases if there are some, or the job is done."""
    leases, replies = state.leases, []
    free = bool(leases.returned) or leases.next < leases.end
    if not (free or is_done(state)):
        return state, ()
    for learner, member in state.members.items():
        if member.waiting:
            kind = "rejoin" if free else "done"
            replies.append(Reply(learner, member.session, kind, state.version))
            state = _with_member(state, learner, member._replace(waiting=False))
    return state, tuple(replies)


def _take_leases(
    arithmetic: _Arithmetic, state: SyncerState, learner: int
) -> SyncerState:
    """Fills up the leases of a member: one, or two if it overlaps exchanges."""
    if arithmetic.fragment:
        return state
    while len(state.members[learner].leases) < 1 + (arithmetic.job.overlap > 0):
        leases, given = take_lease(state.leases)
        if not given:
            break
        member = state.members[learner]
        member = member._replace(leases=(*member.leases, *given))
        state = _with_member(state._replace(leases=leases), learner, member)
    return state


def _after_arrival(member: Member, event: Contribution) -> Member:
    """Updates the running means of the arrivals of a member.

    The first contribution includes compilation; the second one takes its place.
    """
    seconds = event.time - member.read_time
    if event.number <= 2:
        interval, deviation = seconds, 0.0
    else:
        error = seconds - member.interval
        interval = member.interval + _GAIN * error
        deviation = member.deviation + _GAIN * (abs(error) - member.deviation)
    return member._replace(number=event.number, interval=interval, deviation=deviation)


def _pending(
    arithmetic: _Arithmetic, state: SyncerState, event: Contribution
) -> Pending:
    """Returns the record of a contribution."""
    counts = Counts(event.steps, event.examples, event.tokens)
    staleness = max(state.version - event.version, 0)
    weight = arithmetic.job.merge.weight(counts, staleness)
    return Pending(
        event.learner,
        event.session,
        event.time,
        counts,
        staleness,
        weight,
        dict(event.metrics),
    )


def _with_member(state: SyncerState, learner: int, member: Member) -> SyncerState:
    """Replaces a member."""
    return state._replace(members=state.members | {learner: member})


def _is_current(state: SyncerState, pending: Pending) -> bool:
    """Returns whether the membership of a contribution still exists."""
    member = state.members.get(pending.learner)
    return member is not None and member.session == pending.session


def _with_read_times(state: SyncerState, learners: list, now: float) -> SyncerState:
    """Sets the time at which members read the model."""
    members = {
        learner: member._replace(read_time=now) if learner in learners else member
        for learner, member in state.members.items()
    }
    return state._replace(members=members)


def _reply(state: SyncerState, learner: int) -> Reply:
    """Returns the reply with the model."""
    member = state.members[learner]
    kind = "done" if is_done(state) else "model"
    return Reply(learner, member.session, kind, state.version, member.leases)


def _rejoin(state: SyncerState, event: Any) -> Reply:
    """Returns the reply to a learner that must join again."""
    return Reply(event.learner, event.session, "rejoin", state.version)
