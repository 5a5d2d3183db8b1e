"""Times contestants in turn, so that what slows the machine slows all of them."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import jax


class Times(NamedTuple):
    """Seconds of a contestant: the median, the fastest and slowest run, and all."""

    median: float
    least: float
    most: float
    runs: tuple[float, ...]


def ratio(first: Times, second: Times) -> float:
    """Returns the median over the repetitions of the ratio of two contestants."""
    pairs = zip(first.runs, second.runs, strict=True)
    return statistics.median(a / b for a, b in pairs)


def once(call: Callable) -> float:
    """Returns the seconds of a call, until its result is there."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def alternate(
    contestants: Mapping[Hashable, Callable], repeats: int = 5, least: float = 0.05
) -> tuple[dict, float]:
    """Times contestants in turn, after one call each that does not count.

    A contestant that is faster than `least` seconds is called several times in a row.

    Returns the seconds for each call, and the median over the repetitions of the ratio
    of the first contestant to the second.
    """
    for call in contestants.values():
        once(call)
    counts = {
        name: max(1, round(least / max(once(call), 1e-6)))
        for name, call in contestants.items()
    }
    seconds: dict[Hashable, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, call in contestants.items():
            began = time.perf_counter()
            for _ in range(counts[name]):
                jax.block_until_ready(call())
            seconds[name].append((time.perf_counter() - began) / counts[name])
    times = {
        name: Times(statistics.median(runs), min(runs), max(runs), tuple(runs))
        for name, runs in seconds.items()
    }
    first, second, *_ = [*times.values()] * 2
    return times, ratio(first, second)
