"""Latency–bandwidth (α–β) cost model of a training round.

Notation: K workers, c seconds per local step, P bytes of synchronised parameters, and
a link of latency α and bandwidth β.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from localsgd_jax.core import validation


class Link(NamedTuple):
    """A link between workers.

    Attributes:
      latency: α, seconds per message, independent of its size.
      bandwidth: β, bytes per second that a worker sends.
    """

    latency: float
    bandwidth: float


# Typical links, to compare with; orders of magnitude.
LINKS: Mapping[str, Link] = {
    "nvlink": Link(5e-6, 200e9),
    "100-gbit": Link(2e-5, 12.5e9),
    "10-gbit": Link(5e-5, 1.25e9),
    "1-gbit": Link(1e-4, 125e6),
    "internet": Link(3e-2, 12.5e6),
}


class Workload(NamedTuple):
    """A training workload and its synchronisation.

    Attributes:
      workers: K.
      step_seconds: c, seconds per local step.
      parameters: number of synchronised parameters.
      bits: bits sent per parameter.
      fragments: F, number of fragments, each synchronised once per round in an
        all-reduce of its own.
      overlap_steps: τ, local steps that overlap with the all-reduce of a fragment.
      overhead_seconds: o, seconds per round besides local steps and the link: dispatch,
        copies, arithmetic of the rule, and waiting for the slowest worker.
    """

    workers: int
    step_seconds: float
    parameters: int
    bits: float = 32
    fragments: int = 1
    overlap_steps: int = 0
    overhead_seconds: float = 0.0


class PeriodRecommendation(NamedTuple):
    """A recommended synchronisation period.

    Attributes:
      period: H.
      communication_fraction: fraction of the time in exposed communication.
      speedup: speedup over averaging in 32 bits at every step.
      limited_by_theory: whether the theoretical bound, not the link, determines H.
    """

    period: int
    communication_fraction: float
    speedup: float
    limited_by_theory: bool


def all_reduce_time(link: Link, workers: int, size: float) -> float:
    """Predicts the seconds of a ring all-reduce.

        t(P) = 2(K − 1) α + 2(K − 1)/K · P/β

    The ring algorithm sends 2(K − 1) messages of P/K bytes one after another.

    Args:
      link: link between neighbours in the ring.
      workers: K.
      size: P, bytes.

    Returns:
      Seconds.

    Raises:
      ValueError: if K < 1 or a number is negative.

    Example:
      >>> all_reduce_time(Link(latency=0.001, bandwidth=1e6), workers=2, size=1e6)
      1.002
    """
    _check_link("all_reduce_time(link)", link)
    validation.check_int("all_reduce_time(workers)", "workers", workers, 1)
    validation.check_number("all_reduce_time(size)", "size", size, at_least=0)
    hops = 2 * (workers - 1)
    return hops * link.latency + hops / workers * size / link.bandwidth


def exposed_communication_seconds(workload: Workload, link: Link) -> float:
    """Predicts the exposed communication of a round, in seconds.

        w = o + F · max(0, t(P/F) − τc),  P = parameters · bits/8

    Each of F fragments overlaps with τ local steps. The overhead o is included.

    Args:
      workload: the workload.
      link: link between its workers.

    Returns:
      Seconds.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> link = Link(latency=0, bandwidth=1e6)
      >>> workload = Workload(workers=2, step_seconds=0.1, parameters=250_000)
      >>> exposed_communication_seconds(workload, link)
      1.0
      >>> exposed_communication_seconds(workload._replace(overlap_steps=4), link)
      0.6
    """
    call = "exposed_communication_seconds"
    _check_workload(f"{call}(workload)", workload)
    _check_link(f"{call}(link)", link)
    fragment_bytes = workload.parameters * workload.bits / 8 / workload.fragments
    total = all_reduce_time(link, workload.workers, fragment_bytes)
    hidden = workload.overlap_steps * workload.step_seconds
    return workload.overhead_seconds + workload.fragments * max(0.0, total - hidden)


def round_time(workload: Workload, link: Link, period: int) -> float:
    """Predicts the seconds of a round.

        T(H) = Hc + w

    Args:
      workload: the workload.
      link: link between its workers.
      period: H.

    Returns:
      Seconds.

    Raises:
      ValueError: if a number is out of range, or the overlap is longer than a round.

    Example:
      >>> workload = Workload(workers=2, step_seconds=0.1, parameters=250_000)
      >>> round_time(workload, Link(latency=0, bandwidth=1e6), period=10)
      2.0
    """
    _check_arguments("round_time", workload, link)
    validation.check_int("round_time(period)", "period", period, 1)
    if workload.overlap_steps > period:
        raise ValueError(
            "round_time(workload, period): overlap_steps must be at most the period, "
            f"got {workload.overlap_steps} and {period}"
        )
    exposed = exposed_communication_seconds(workload, link)
    return period * workload.step_seconds + exposed


def speedup(workload: Workload, link: Link, period: int) -> float:
    """Predicts the speedup per step over averaging in 32 bits at every step.

        S(H) = H (c + o + t(4 · parameters)) / T(H)

    Args:
      workload: the workload.
      link: link between its workers.
      period: H.

    Returns:
      The ratio of the times; H = 1 without compression gives 1.

    Example:
      >>> workload = Workload(workers=2, step_seconds=0.1, parameters=250_000)
      >>> speedup(workload, Link(latency=0, bandwidth=1e6), period=10)
      5.5
    """
    _check_arguments("speedup", workload, link)
    period = validation.check_int("speedup(period)", "period", period, 1)
    baseline = workload._replace(bits=32, fragments=1, overlap_steps=0)
    return period * round_time(baseline, link, 1) / round_time(workload, link, period)


def exposed_communication_fraction(
    workload: Workload, link: Link, period: int
) -> float:
    """Predicts the fraction of the time in exposed communication, w/T(H)."""
    call = "exposed_communication_fraction"
    _check_arguments(call, workload, link)
    period = validation.check_int(f"{call}(period)", "period", period, 1)
    return exposed_communication_seconds(workload, link) / round_time(
        workload, link, period
    )


def period_for_communication_fraction(
    workload: Workload, link: Link, max_fraction: float
) -> int:
    """Returns the shortest period below a fraction of exposed communication.

        w/(Hc + w) ≤ s  ⟺  H ≥ w(1 − s)/(sc)

    Args:
      workload: the workload.
      link: link between its workers.
      max_fraction: s, in (0, 1).

    Returns:
      H, at least 1 and at least the overlap.

    Raises:
      ValueError: if s is out of range.

    Example:
      >>> workload = Workload(workers=2, step_seconds=0.1, parameters=250_000)
      >>> link = Link(latency=0, bandwidth=1e6)
      >>> period_for_communication_fraction(workload, link, max_fraction=0.1)
      90
    """
    call, name = "period_for_communication_fraction", "max_fraction"
    _check_arguments(call, workload, link)
    validation.check_number(f"{call}({name})", name, max_fraction, above=0, below=1)
    exposed = exposed_communication_seconds(workload, link)
    period = exposed * (1 - max_fraction) / (max_fraction * workload.step_seconds)
    # Without the factor, a rounding error above an integer would round up to the next.
    return max(1, workload.overlap_steps, math.ceil(period * (1 - 1e-12)))


def recommend_period(
    workload: Workload, link: Link, max_fraction: float, max_period: int | None = None
) -> PeriodRecommendation:
    """Recommends a period: the shortest for the link, limited by the theory.

    Args:
      workload: the workload.
      link: link between its workers.
      max_fraction: largest fraction of the time in exposed communication.
      max_period: largest period that keeps the convergence rate, such as
        `theory.longest_period(...)`; None if unknown.

    Returns:
      The recommendation.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> workload = Workload(workers=2, step_seconds=0.1, parameters=250_000)
      >>> link = Link(latency=0, bandwidth=1e6)
      >>> advice = recommend_period(workload, link, max_fraction=0.1, max_period=10)
      >>> advice.period, advice.communication_fraction, advice.speedup
      (10, 0.5, 5.5)
      >>> advice.limited_by_theory
      True
    """
    call, name = "recommend_period", "max_fraction"
    _check_arguments(call, workload, link)
    validation.check_number(f"{call}({name})", name, max_fraction, above=0, below=1)
    if max_period is not None:
        name, largest = "max_period", validation.MAX_INT64
        validation.check_int(f"{call}({name})", name, max_period, 1, largest)
    period = period_for_communication_fraction(workload, link, max_fraction)
    is_limited = max_period is not None and max_period < period
    if max_period is not None and is_limited:
        period = max(max_period, workload.overlap_steps)
    return PeriodRecommendation(
        period,
        exposed_communication_fraction(workload, link, period),
        speedup(workload, link, period),
        is_limited,
    )


def fit_link(workers: int, sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """Fits a link to measured all-reduce times.

    α and β minimise Σ ((t(Pᵢ) − tᵢ)/tᵢ)². Relative errors give small sizes the same
    influence as large ones.

    Args:
      workers: K, at least 2.
      sizes: bytes of each all-reduce.
      seconds: measured time of each all-reduce.

    Returns:
      The link; a negative latency becomes 0.

    Raises:
      ValueError: if K < 2, if there are fewer than two distinct sizes or not one time
        for each size, or if the fitted bandwidth is not positive.

    Example:
      >>> link = Link(latency=0.001, bandwidth=1e6)
      >>> times = [all_reduce_time(link, 4, size) for size in (1e3, 1e6)]
      >>> fitted = fit_link(4, (1e3, 1e6), times)
      >>> round(fitted.latency, 6), round(fitted.bandwidth)
      (0.001, 1000000)
    """
    validation.check_int("fit_link(workers)", "workers", workers, 2)
    for name, values in (("sizes", sizes), ("seconds", seconds)):
        validation.check_type(f"fit_link({name})", name, values, Sequence, np.ndarray)
        for value in values:
            element = f"an element of {name}"
            validation.check_number(f"fit_link({name})", element, value, above=0)
    if len(set(sizes)) < 2 or len(sizes) != len(seconds):
        raise ValueError(
            "fit_link(sizes, seconds): at least two sizes and one time for each are "
            f"needed, got {list(sizes)} and {list(seconds)}"
        )
    hops, times = 2 * (workers - 1), np.asarray(seconds, float)
    terms = np.stack([np.full(len(times), hops), hops / workers * np.asarray(sizes)], 1)
    (latency, inverse), *_ = np.linalg.lstsq(
        terms / times[:, None], np.ones(len(times)), rcond=None
    )
    if inverse <= 0:
        raise ValueError(
            "fit_link(seconds): the times must increase with the sizes, got "
            f"{list(seconds)} for {list(sizes)} bytes"
        )
    return Link(max(0.0, float(latency)), float(1 / inverse))


def _check_arguments(call: str, workload: Workload, link: Link) -> None:
    """Raises unless the arguments are a workload and a link with valid fields."""
    _check_workload(f"{call}(workload)", workload)
    _check_link(f"{call}(link)", link)


def _check_link(call: str, link: Link) -> None:
    """Raises unless the argument is a link with valid fields."""
    validation.check_type(call, "link", link, Link)
    validation.check_number(call, "latency", link.latency, at_least=0)
    validation.check_number(call, "bandwidth", link.bandwidth, above=0)


def _check_workload(call: str, workload: Workload) -> None:
    """Raises unless the argument is a workload with valid fields."""
    validation.check_type(call, "workload", workload, Workload)
    largest = validation.MAX_INT64
    validation.check_int(call, "workers", workload.workers, 1)
    validation.check_int(call, "parameters", workload.parameters, 1, largest)
    validation.check_int(call, "fragments", workload.fragments, 1)
    validation.check_int(call, "overlap_steps", workload.overlap_steps, 0)
    overhead = "overhead_seconds"
    validation.check_number(call, overhead, workload.overhead_seconds, at_least=0)
    validation.check_number(call, "step_seconds", workload.step_seconds, above=0)
    validation.check_number(call, "bits", workload.bits, above=0)
