"""Event traces of asynchronous Local SGD on a virtual clock."""

import bisect
import enum
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from localsgd_jax.core.validation import (
    MAX_INT64,
    check_int,
    check_number,
    check_type,
    describe,
)
from localsgd_jax.schedules.per_worker import resolve_schedules

PerStep = float | Sequence[float] | np.ndarray


class EventKind(enum.IntEnum):
    """Kind of an event; simultaneous events occur in this order.

    Attributes:
      STEP: a worker completes a local step.
      PUSH: a worker sends its update to the aggregate.
      APPLY: the aggregation applies an update.
      PULL: a worker reads the aggregate.
    """

    STEP = 0
    PUSH = 1
    APPLY = 2
    PULL = 3


class EventTrace(NamedTuple):
    """Events of a run in chronological order, as NumPy columns.

    Attributes:
      time: virtual time.
      kind: an `EventKind`.
      worker: index k of the worker.
      step: local steps that worker k had completed when it sent the update; for
        STEP, including this one.
      buffer_slot: index of the in-flight buffer that holds the update between PUSH and
        APPLY, else -1.
      staleness_updates: for APPLY, the number of updates applied after worker k had
        pulled the aggregate and before this one, simultaneous updates excluded; else 0.
      staleness_steps: for APPLY, the number of local steps of worker k between the pull
        that this update started from and its application, H + τ; else 0.
    """

    time: np.ndarray
    kind: np.ndarray
    worker: np.ndarray
    step: np.ndarray
    buffer_slot: np.ndarray
    staleness_updates: np.ndarray
    staleness_steps: np.ndarray


def simulate_events(
    workers: int,
    steps: int | Sequence[int],
    schedule: int | Callable | Sequence,
    *,
    speed: PerStep = 1.0,
    delay: PerStep = 0.0,
) -> EventTrace:
    """Computes the event trace of Algorithm 2 by discrete-event simulation.

    The trace does not depend on any model parameter. A worker of speed v completes its
    local step t at the time t/v. If t is one of its synchronisation indices, or its
    last step, it pushes its update since its last pull. The update is applied `delay`
    later. The worker pulls the aggregate at once, without waiting for its own update.
    Simultaneous events are ordered: steps, pushes, applications, pulls. Without delay,
    workers that synchronise at the same time therefore pull an aggregate that contains
    the updates of all of them: equal speeds and one schedule give Algorithm 1.

    Times are compared as floats. They are exact for speeds that are integers or
    negative powers of 2.

    Args:
      workers: K.
      steps: T, local steps of each worker, or K numbers of steps.
      schedule: a period or a schedule, or K of them; called with the worker's own
        number of local steps.
      speed: local steps per unit of time: a number, K numbers, or `(T, K)` numbers for
        each single step, such as from `random_speeds`.
      delay: time from a push to its application: a number, K numbers, or `(T, K)`
        numbers for a push after each step. For a worker of speed 1 it is τ.

    Returns:
      The events.

    Raises:
      TypeError: if a count is not an int or a schedule is neither an int nor callable.
      ValueError: if a number is out of range or an array has another shape.

    Example:
      >>> events = simulate_events(workers=2, steps=4, schedule=2, speed=[2, 1])
      >>> applied = events.kind == EventKind.APPLY
      >>> events.time[applied], events.worker[applied]
      (array([1., 2., 2., 4.]), array([0, 0, 1, 1], dtype=int32))
      >>> events.staleness_updates[applied]
      array([0, 0, 1, 0], dtype=int32)

    References:
      Stich, Local SGD Converges Fast and Communicates Little, 2019, Algorithm 2.
      arXiv:1805.09767
    """
    workers = check_int("simulate_events(workers)", "workers", workers, 1)
    counts = _steps_per_worker(steps, workers)
    due = resolve_schedules("simulate_events(schedule)", schedule, workers)
    shape = (max(counts), workers)
    speeds = _broadcast_per_step(
        "simulate_events(speed)", "positive", speed, shape, lambda x: x > 0
    )
    delays = _broadcast_per_step(
        "simulate_events(delay)", "at least 0", delay, shape, lambda x: x >= 0
    )
    constant = np.ndim(speed) < 2
    times = [
        _completion_times(speeds[:count, k], constant) for k, count in enumerate(counts)
    ]
    rows = []
    for k, count in enumerate(counts):
        for t, now in enumerate(times[k], 1):
            rows.append((now, EventKind.STEP, now, k, t))
            if t == count or due[k](t):
                applied = now + float(delays[t - 1, k])
                rows.append((now, EventKind.PUSH, now, k, t))
                rows.append((applied, EventKind.APPLY, now, k, t))
                rows.append((now, EventKind.PULL, now, k, t))
    return _annotate(sorted(rows), times)


def random_speeds(
    workers: int, steps: int, std: float, *, seed: int = 0, speed: PerStep = 1.0
) -> np.ndarray:
    """Draws a random speed for each local step.

    Step t of worker k takes the time d/v. v is the mean speed of the worker; the d are
    independent and Gamma-distributed with mean 1 and standard deviation `std`.

    Args:
      workers: K.
      steps: T.
      std: coefficient of variation of the step time, positive; 1 for exponential
        times.
      seed: seed of the random numbers.
      speed: v, a number or K numbers.

    Returns:
      Speeds `(T, K)` for `simulate_events`.

    Raises:
      TypeError: if a count is not an int.
      ValueError: if a number is out of range.

    Example:
      >>> random_speeds(workers=2, steps=5, std=0.3, speed=[1, 0.25]).shape
      (5, 2)
    """
    shape = (
        check_int("random_speeds(steps)", "steps", steps, 1),
        check_int("random_speeds(workers)", "workers", workers, 1),
    )
    std = check_number("random_speeds(std)", "std", std, above=0)
    seed = check_int("random_speeds(seed)", "seed", seed, 0, MAX_INT64)
    speeds = _broadcast_per_step(
        "random_speeds(speed)", "positive", speed, shape, lambda x: x > 0
    )
    times = np.random.default_rng(seed).gamma(std**-2, std**2, shape)
    return speeds / np.maximum(times, np.finfo(float).tiny)


def max_staleness(events: EventTrace) -> np.ndarray:
    """Returns the maximum staleness of each worker in local steps.

    The staleness of an update is the number of local steps of its worker between the
    pull that it started from and its application. H of them are part of the update; τ
    were taken while it was in flight.

        sₖ = max over the updates of worker k of (H + τ)

    Args:
      events: from `simulate_events`.

    Returns:
      `(K,)` ints, the value of H + τ in the bound for Algorithm 2.

    Example:
      >>> events = simulate_events(2, steps=12, schedule=4, speed=[1, 0.5], delay=2)
      >>> max_staleness(events)
      array([6, 5], dtype=int32)

    References:
      Stich, Local SGD Converges Fast and Communicates Little, 2019, Theorem 5.1.
      arXiv:1805.09767
    """
    check_type("max_staleness(events)", "events", events, EventTrace)
    maximum = np.zeros(events.worker.max() + 1, np.int32)
    np.maximum.at(maximum, events.worker, events.staleness_steps)
    return maximum


def _steps_per_worker(steps: int | Sequence[int], workers: int) -> list[int]:
    """Returns the number of local steps of each worker."""
    is_sequence = isinstance(steps, Sequence | np.ndarray)
    counts: list = list(steps) if is_sequence else [steps] * workers
    if len(counts) != workers:
        raise ValueError(
            f"simulate_events(steps): one number or {workers} are needed, one for each "
            f"worker, got {len(counts)}"
        )
    call = "simulate_events(steps)"
    return [check_int(call, "the number of steps", count, 1) for count in counts]


def _broadcast_per_step(
    call: str, rule: str, value: PerStep, shape: tuple[int, int], valid: Callable
) -> np.ndarray:
    """Broadcasts a number, or numbers per worker, to `(T, K)`.

    Raises:
      ValueError: if the shape is none of these, or a number is not finite and valid.
    """
    values = _real_array(call, value)
    if values.shape not in ((), shape[1:], shape):
        raise ValueError(
            f"{call}: it must be a number, {shape[1]} numbers or an array of shape "
            f"{shape}, got shape {values.shape}"
        )
    if (bad := ~(np.isfinite(values) & valid(values))).any():
        raise ValueError(f"{call}: it must be finite and {rule}, got {values[bad][0]}")
    return np.broadcast_to(values, shape)


def _real_array(call: str, value: object) -> np.ndarray:
    """Returns numbers as a float array; raises a TypeError if they are no numbers."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0, object)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{call}: it must be real numbers, got {describe(value)}")
    return array.astype(float)


def _completion_times(speeds: np.ndarray, constant: bool) -> list[float]:
    """Returns the completion times of the local steps of one worker."""
    if constant:
        # A quotient is rounded once, so that equal times compare equal; partial sums
        # accumulate rounding errors.
        return (np.arange(1, len(speeds) + 1) / speeds).tolist()
    return np.cumsum(1 / speeds).tolist()


def _annotate(rows: Iterable[tuple], times: list[list[float]]) -> EventTrace:
    """Assigns buffer slots and staleness to the updates of sorted events.

    Args:
      rows: tuples (time, kind, time of the push, worker, step), sorted.
      times: completion times of the steps of each worker.

    Returns:
      The events as columns.
    """
    free_slots, in_flight, applied, table = [], {}, [], []
    last_pull = [(-1.0, 0)] * len(times)
    slots = 0
    for now, kind, _, k, t in rows:
        slot, staleness_updates, staleness_steps = -1, 0, 0
        if kind == EventKind.PUSH:
            slots += not free_slots
            slot = free_slots.pop() if free_slots else slots - 1
            in_flight[k, t] = slot, *last_pull[k]
            last_pull[k] = now, t
        elif kind == EventKind.APPLY:
            slot, pulled, pulled_step = in_flight.pop((k, t))
            free_slots.append(slot)
            staleness_updates = bisect.bisect_left(applied, now)
            staleness_updates -= bisect.bisect_right(applied, pulled)
            staleness_steps = bisect.bisect_right(times[k], now) - pulled_step
            applied.append(now)
        table.append((now, kind, k, t, slot, staleness_updates, staleness_steps))
    time, *columns = zip(*table, strict=True)
    return EventTrace(np.array(time), *(np.array(x, np.int32) for x in columns))
