"""What a period costs in time: a model of latency and bandwidth.

With K workers, c seconds for a local step, P bytes that are agreed on, and a link of
latency α and bandwidth β.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from localsgd_jax import checks


class Link(NamedTuple):
    """What lies between workers.

    Attributes:
      latency: α, seconds until a message begins to arrive.
      bandwidth: β, bytes per second that a worker sends.
    """

    latency: float
    bandwidth: float


# Orders of magnitude, to compare with.
LINKS: Mapping[str, Link] = {
    "nvlink": Link(5e-6, 200e9),
    "100-gbit": Link(2e-5, 12.5e9),
    "10-gbit": Link(5e-5, 1.25e9),
    "1-gbit": Link(1e-4, 125e6),
    "internet": Link(3e-2, 12.5e6),
}


class Job(NamedTuple):
    """What is trained, and how its workers agree.

    Attributes:
      workers: K.
      compute: c, seconds for a local step.
      parameters: numbers that workers agree on.
      bits: for each of them on the wire.
      fragments: F, pieces that are exchanged one by one, each once in a round.
      overlap: local steps during which a piece may travel while workers go on.
      overhead: o, seconds that a round takes besides its steps and the link: its
        dispatch, copies, the arithmetic of the rule, and waiting for the last.
    """

    workers: int
    compute: float
    parameters: int
    bits: float = 32
    fragments: int = 1
    overlap: int = 0
    overhead: float = 0.0


class Advice(NamedTuple):
    """Which period to take.

    Attributes:
      period: H.
      share: of the time that workers then wait.
      speedup: over averaging at every step.
      capped: whether the statistics, not the link, ask for the period.
    """

    period: int
    share: float
    speedup: float
    capped: bool


def all_reduce_time(link: Link, workers: int, size: float) -> float:
    """Predicts how long K workers take to average.

        t(P) = 2(K − 1) α + 2(K − 1)/K · P/β

    by the ring algorithm: 2(K − 1) messages of P/K bytes each, one after another.

    Args:
      link: between neighbours.
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
    checks.integer("all_reduce_time(workers)", "workers", workers, 1)
    _check_link("all_reduce_time(link)", link)
    hops = 2 * (workers - 1)
    return hops * link.latency + hops / workers * size / link.bandwidth


def waiting_time(job: Job, link: Link) -> float:
    """Predicts how long workers wait in a round.

        w = o + F · max(0, t(P/F) − τc),  P = parameters · bits/8

    for F fragments that may travel during τ local steps each.

    Args:
      job: what is trained.
      link: between its workers.

    Returns:
      Seconds.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> link = Link(latency=0, bandwidth=1e6)
      >>> job = Job(workers=2, compute=0.1, parameters=250_000)
      >>> waiting_time(job, link), waiting_time(job._replace(overlap=4), link)
      (1.0, 0.6)
    """
    _check_job("waiting_time(job)", job)
    piece = job.parameters * job.bits / 8 / job.fragments
    alone = all_reduce_time(link, job.workers, piece)
    hidden = job.overlap * job.compute
    return job.overhead + job.fragments * max(0.0, alone - hidden)


def round_time(job: Job, link: Link, period: int) -> float:
    """Predicts how long a round takes.

        T(H) = Hc + w

    Args:
      job: what is trained.
      link: between its workers.
      period: H.

    Returns:
      Seconds.

    Raises:
      ValueError: if a number is out of range, or a fragment would travel longer than
        a round.

    Example:
      >>> job = Job(workers=2, compute=0.1, parameters=250_000)
      >>> round_time(job, Link(latency=0, bandwidth=1e6), period=10)
      2.0
    """
    checks.integer("round_time(period)", "period", period, 1)
    if job.overlap > period:
        raise ValueError(
            f"round_time(job, period): the overlap must be at most the period, got "
            f"{job.overlap} and {period}"
        )
    return period * job.compute + waiting_time(job, link)


def speedup(job: Job, link: Link, period: int) -> float:
    """Predicts how much faster a step is than with averaging in 32 bits at each.

        S(H) = H (c + t(4 · parameters)) / T(H)

    Args:
      job: what is trained.
      link: between its workers.
      period: H.

    Returns:
      The ratio; H = 1 without compression gives 1.

    Example:
      >>> job = Job(workers=2, compute=0.1, parameters=250_000)
      >>> speedup(job, Link(latency=0, bandwidth=1e6), period=10)
      5.5
    """
    plain = job._replace(bits=32, fragments=1, overlap=0)
    return period * round_time(plain, link, 1) / round_time(job, link, period)


def share(job: Job, link: Link, period: int) -> float:
    """Predicts the share of the time that workers wait: w/T(H)."""
    return waiting_time(job, link) / round_time(job, link, period)


def period_for_share(job: Job, link: Link, most: float) -> int:
    """Finds the shortest period at which workers wait no more than a share.

        w/(Hc + w) ≤ s  ⟺  H ≥ w(1 − s)/(sc)

    Args:
      job: what is trained.
      link: between its workers.
      most: s, in (0, 1).

    Returns:
      H, at least 1 and the overlap.

    Raises:
      ValueError: if s is out of range.

    Example:
      >>> job = Job(workers=2, compute=0.1, parameters=250_000)
      >>> period_for_share(job, Link(latency=0, bandwidth=1e6), most=0.1)
      90
    """
    if not 0 < most < 1:
        raise ValueError(f"period_for_share(most): most must be in (0, 1), got {most}")
    wait = waiting_time(job, link)
    # A quotient that is whole but for rounding must not become the next number.
    needed = math.ceil(wait * (1 - most) / (most * job.compute) * (1 - 1e-12))
    return max(1, job.overlap, needed)


def advise(job: Job, link: Link, most: float, longest: int | None = None) -> Advice:
    """Chooses the period: long enough for the link, not too long for the statistics.

    Args:
      job: what is trained.
      link: between its workers.
      most: share of the time that workers may wait.
      longest: period at which drift begins to cost, such as
        `theory.longest_period(...)`; None if unknown.

    Returns:
      The advice.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> job = Job(workers=2, compute=0.1, parameters=250_000)
      >>> advise(job, Link(latency=0, bandwidth=1e6), most=0.1, longest=10)
      Advice(period=10, share=0.5, speedup=5.5, capped=True)
    """
    period, capped = period_for_share(job, link, most), False
    if longest is not None and longest < period:
        checks.integer("advise(longest)", "longest", longest, 1)
        period, capped = max(longest, job.overlap), True
    return Advice(period, share(job, link, period), speedup(job, link, period), capped)


def fit_link(workers: int, sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """Fits latency and bandwidth to measured all-reduces.

    α and β minimise Σ ((t(Pᵢ) − tᵢ)/tᵢ)², so that small sizes count as well.

    Args:
      workers: K, at least 2.
      sizes: bytes.
      seconds: what they took, as many.

    Returns:
      The link; a latency below zero becomes zero.

    Raises:
      ValueError: if K < 2, or there are not two sizes, or more bytes did not take
        longer.

    Example:
      >>> link = Link(latency=0.001, bandwidth=1e6)
      >>> times = [all_reduce_time(link, 4, size) for size in (1e3, 1e6)]
      >>> fitted = fit_link(4, (1e3, 1e6), times)
      >>> round(fitted.latency, 6), round(fitted.bandwidth)
      (0.001, 1000000)
    """
    checks.integer("fit_link(workers)", "workers", workers, 2)
    if len(set(sizes)) < 2 or len(sizes) != len(seconds):
        raise ValueError(
            f"fit_link(sizes, seconds): two sizes and a time for each are needed, got "
            f"{list(sizes)} and {list(seconds)}"
        )
    hops, times = 2 * (workers - 1), np.asarray(seconds, float)
    terms = np.stack([np.full(len(times), hops), hops / workers * np.asarray(sizes)], 1)
    (latency, inverse), *_ = np.linalg.lstsq(
        terms / times[:, None], np.ones(len(times)), rcond=None
    )
    if inverse <= 0:
        raise ValueError(
            f"fit_link(seconds): more bytes must take longer, got {list(seconds)} for "
            f"{list(sizes)} bytes"
        )
    return Link(max(0.0, float(latency)), float(1 / inverse))


def _check_link(call: str, link: Link) -> None:
    """Refuses impossible links."""
    if not (link.latency >= 0 and link.bandwidth > 0):
        raise ValueError(
            f"{call}: the latency must be at least 0 and the bandwidth positive, got "
            f"{link.latency} and {link.bandwidth}"
        )


def _check_job(call: str, job: Job) -> None:
    """Refuses impossible jobs."""
    checks.integer(call, "workers", job.workers, 1)
    checks.integer(call, "parameters", job.parameters, 1)
    checks.integer(call, "fragments", job.fragments, 1)
    checks.integer(call, "overlap", job.overlap, 0)
    if not job.overhead >= 0:
        raise ValueError(f"{call}: overhead must be at least 0, got {job.overhead}")
    if not (job.compute > 0 and job.bits > 0):
        raise ValueError(
            f"{call}: compute and bits must be positive, got {job.compute} and "
            f"{job.bits}"
        )
