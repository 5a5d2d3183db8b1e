"""When asynchronous workers step, write and read: a virtual clock."""

import bisect
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from localsgd_jax.asynchronous.checks import as_schedules, whole

STEP, SEND, ARRIVE, READ = range(4)

Speed = float | Sequence[float] | np.ndarray


class Events(NamedTuple):
    """What happens in a run, in order: NumPy columns with an entry for each event.

    Attributes:
      time: virtual time.
      kind: 0, worker k finishes a local step; 1, it sends its progress; 2, that
        progress arrives in the aggregate; 3, the worker reads the aggregate.
      worker: k.
      step: local steps that worker k had finished when it sent; for kind 0, with
        this one.
      slot: where the progress waits between 1 and 2, else -1.
      missed: for kind 2, the writes that arrived after worker k had read and before
        this one, those of the same instant not counted; else 0.
      age: for kind 2, the local steps of worker k from the read that this progress
        started from to its arrival, H + τ; else 0.
    """

    time: np.ndarray
    kind: np.ndarray
    worker: np.ndarray
    step: np.ndarray
    slot: np.ndarray
    missed: np.ndarray
    age: np.ndarray


def order(
    workers: int,
    steps: int | Sequence[int],
    every: int | Callable | Sequence,
    *,
    speed: Speed = 1.0,
    delay: Speed = 0.0,
) -> Events:
    """Computes the order of events of Algorithm 2; it depends on no value.

    A worker of speed v finishes its local step t at the time t/v. If t is one of its
    synchronisation indices, or its last step, it sends its progress since it last
    read; that arrives `delay` later; and it reads at once, without waiting for its
    own write. What happens at one instant happens in this order: all steps, all
    sends, all arrivals, all reads. So without delay workers that meet read what all
    of them have written: equal speeds and one schedule give Algorithm 1.

    Instants are compared as floats; speeds that are whole numbers or negative powers
    of 2 meet where they meet on paper.

    Args:
      workers: K.
      steps: T, local steps of each worker, or K numbers of steps.
      every: a period or a schedule, or K of them; called with the worker's own
        number of local steps.
      speed: local steps per unit of time: a number, K numbers, or `(T, K)` ones for
        each single step, such as `random_speeds`.
      delay: time from a write to its arrival: a number, K numbers, or `(T, K)` ones
        for a write after each step. For a worker of speed 1 it is τ.

    Returns:
      The events.

    Raises:
      TypeError: if an argument is not what it must be.
      ValueError: if a number is out of range or an array has another shape.

    Example:
      >>> events = order(workers=2, steps=4, every=2, speed=[2, 1])
      >>> writes = events.kind == 2
      >>> events.time[writes], events.worker[writes]
      (array([1., 2., 2., 4.]), array([0, 0, 1, 1], dtype=int32))
      >>> events.missed[writes]
      array([0, 0, 1, 0], dtype=int32)

    References:
      Stich, Local SGD Converges Fast and Communicates Little, 2019, Algorithm 2.
      arXiv:1805.09767
    """
    workers = whole("order(workers)", workers)
    counts = _counts(steps, workers)
    due = as_schedules("order(every)", every, workers)
    shape = (max(counts), workers)
    pace = _table("order(speed)", "positive", speed, shape, lambda x: x > 0)
    lag = _table("order(delay)", "at least 0", delay, shape, lambda x: x >= 0)
    constant = np.ndim(speed) < 2
    times = [_times(pace[:count, k], constant) for k, count in enumerate(counts)]
    rows = []
    for k, count in enumerate(counts):
        for t, now in enumerate(times[k], 1):
            rows.append((now, STEP, now, k, t))
            if t == count or due[k](t):
                arrival = now + float(lag[t - 1, k])
                rows.append((now, SEND, now, k, t))
                rows.append((arrival, ARRIVE, now, k, t))
                rows.append((now, READ, now, k, t))
    return _complete(sorted(rows), times)


def random_speeds(
    workers: int, steps: int, spread: float, *, seed: int = 0, speed: Speed = 1.0
) -> np.ndarray:
    """Draws the speed of every single local step.

    Step t of worker k takes the time d/v, with v its mean speed, and d independent
    and Gamma-distributed with mean 1 and standard deviation `spread`.

    Args:
      workers: K.
      steps: T.
      spread: coefficient of variation, positive; 1 for exponential times.
      seed: of the draws.
      speed: v, a number or K numbers.

    Returns:
      Speeds `(T, K)` for `order`.

    Raises:
      TypeError: if a count is not an int.
      ValueError: if a number is out of range.

    Example:
      >>> random_speeds(workers=2, steps=5, spread=0.3, speed=[1, 0.25]).shape
      (5, 2)
    """
    shape = (
        whole("random_speeds(steps)", steps),
        whole("random_speeds(workers)", workers),
    )
    if not 0 < spread < np.inf:
        raise ValueError(
            f"random_speeds(spread): it must be positive and finite, got {spread}"
        )
    pace = _table("random_speeds(speed)", "positive", speed, shape, lambda x: x > 0)
    times = np.random.default_rng(seed).gamma(spread**-2, spread**2, shape)
    return pace / np.maximum(times, np.finfo(float).tiny)


def staleness(events: Events) -> np.ndarray:
    """Returns the realised staleness H + τ of each worker.

    A write is as stale as its worker has taken local steps from the read that it
    started from to its arrival: H of them are in it, during τ it was under way.

        sₖ = max over the writes of worker k of (H + τ)

    Args:
      events: from `order`.

    Returns:
      `(K,)` ints, what takes the place of H + τ in the bound for Algorithm 2.

    Example:
      >>> staleness(order(workers=2, steps=12, every=4, speed=[1, 0.5], delay=2))
      array([6, 5], dtype=int32)

    References:
      Stich, Local SGD Converges Fast and Communicates Little, 2019, Theorem 5.1.
      arXiv:1805.09767
    """
    worst = np.zeros(events.worker.max() + 1, np.int32)
    np.maximum.at(worst, events.worker, events.age)
    return worst


def _counts(steps: int | Sequence[int], workers: int) -> list[int]:
    """Returns the number of local steps of each worker."""
    several = isinstance(steps, Sequence | np.ndarray)
    many: list = list(steps) if several else [steps] * workers
    if len(many) != workers:
        raise ValueError(
            f"order(steps): one number or {workers} are needed, one for each worker, "
            f"got {len(many)}"
        )
    return [whole("order(steps)", count) for count in many]


def _table(
    call: str, rule: str, value: Speed, shape: tuple[int, int], holds: Callable
) -> np.ndarray:
    """Returns a number for each step and worker; refuses shapes and ranges."""
    given = np.asarray(value, float)
    if given.shape not in ((), shape[1:], shape):
        raise ValueError(
            f"{call}: a number, {shape[1]} numbers or {shape} ones are needed, got "
            f"shape {given.shape}"
        )
    if (bad := ~(np.isfinite(given) & holds(given))).any():
        raise ValueError(f"{call}: it must be finite and {rule}, got {given[bad][0]}")
    return np.broadcast_to(given, shape)


def _times(speeds: np.ndarray, constant: bool) -> list[float]:
    """Returns when the steps of one worker end."""
    if constant:
        # A quotient is rounded once: equal instants stay equal, unlike those of sums.
        return (np.arange(1, len(speeds) + 1) / speeds).tolist()
    return np.cumsum(1 / speeds).tolist()


def _complete(rows: Iterable[tuple], times: list[list[float]]) -> Events:
    """Gives writes their slots and their staleness; returns the columns."""
    free, under_way, arrivals, table = [], {}, [], []
    since = [(-1.0, 0)] * len(times)
    slots = 0
    for now, kind, _, k, t in rows:
        slot, missed, age = -1, 0, 0
        if kind == SEND:
            slots += not free
            slot = free.pop() if free else slots - 1
            under_way[k, t] = slot, *since[k]
            since[k] = now, t
        elif kind == ARRIVE:
            slot, read, read_step = under_way.pop((k, t))
            free.append(slot)
            missed = bisect.bisect_left(arrivals, now)
            missed -= bisect.bisect_right(arrivals, read)
            age = bisect.bisect_right(times[k], now) - read_step
            arrivals.append(now)
        table.append((now, kind, k, t, slot, missed, age))
    time, *columns = zip(*table, strict=True)
    return Events(np.array(time), *(np.array(x, np.int32) for x in columns))
