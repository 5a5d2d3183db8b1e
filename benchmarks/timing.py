"""Interleaved timing: load on the machine slows all candidates alike."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import jax


class Times(NamedTuple):
    """Seconds of a call: median, minimum and maximum, and all repetitions."""

    median: float
    minimum: float
    maximum: float
    runs: tuple[float, ...]


def ratio(first: Times, second: Times) -> float:
    """Returns the median over the repetitions of the ratio of two times."""
    pairs = zip(first.runs, second.runs, strict=True)
    return statistics.median(a / b for a, b in pairs)


def time_call(call: Callable) -> float:
    """Returns the seconds of a call, until its result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def make_stepper(call: Callable, held: list, batches: list) -> Callable:
    """Returns a function that continues from the state of its last call.

    Args:
      call: `call(state, batch) -> (state, metrics)`; it may donate the state.
      held: a list with the state, which is replaced; several steppers may share it.
      batches: batches of one call of the returned function.

    Returns:
      `step() -> (state, metrics)`.
    """

    def step() -> tuple:
        metrics = None
        for batch in batches:
            held[0], metrics = call(held[0], batch)
        return held[0], metrics

    return step


def time_interleaved(
    calls: Mapping[Hashable, Callable], repeats: int = 5, min_seconds: float = 0.05
) -> tuple[dict, float]:
    """Times several calls alternately, after one call of each as a warm-up.

    A call shorter than `min_seconds` is repeated several times in a row.

    Returns the seconds of each call, and the median over the repetitions of the ratio
    of the first call to the second.
    """
    for call in calls.values():
        time_call(call)
    counts = {
        name: max(1, round(min_seconds / max(time_call(call), 1e-6)))
        for name, call in calls.items()
    }
    seconds: dict[Hashable, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                jax.block_until_ready(call())
            seconds[name].append((time.perf_counter() - start) / counts[name])
    times = {
        name: Times(statistics.median(runs), min(runs), max(runs), tuple(runs))
        for name, runs in seconds.items()
    }
    first, second, *_ = [*times.values()] * 2
    return times, ratio(first, second)
