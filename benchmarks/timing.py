"""Times contestants in turn, so that what slows the machine slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax


class Times(NamedTuple):
    """Seconds of a contestant: the median, and the fastest and slowest run."""

    median: float
    least: float
    most: float


def once(call: Callable) -> float:
    """Returns the seconds of a call, until its result is there."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def alternate(
    contestants: Mapping[str, Callable], repeats: int = 5, least: float = 0.05
) -> tuple[dict[str, Times], float]:
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
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, call in contestants.items():
            began = time.perf_counter()
            for _ in range(counts[name]):
                jax.block_until_ready(call())
            seconds[name].append((time.perf_counter() - began) / counts[name])
    first, second, *_ = [*seconds.values()] * 2
    ratio = statistics.median(a / b for a, b in zip(first, second, strict=True))
    return {
        name: Times(statistics.median(runs), min(runs), max(runs))
        for name, runs in seconds.items()
    }, ratio
