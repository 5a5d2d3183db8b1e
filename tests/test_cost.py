"""The time model by hand, and what it refuses."""

import math

import pytest

from localsgd_jax import cost

JOB = cost.Job(workers=4, compute=0.01, parameters=1_000_000)
LINK = cost.Link(latency=0.001, bandwidth=1e8)
# 4 MB among four: six messages of 1 MB.
EXCHANGE = 6 * (0.001 + 0.01)


def test_an_all_reduce_is_six_messages_of_a_quarter():
    assert math.isclose(cost.all_reduce_time(LINK, 4, 4e6), EXCHANGE)
    assert cost.all_reduce_time(LINK, 1, 4e6) == 0


def test_latency_alone_does_not_depend_on_the_size():
    slow = cost.Link(latency=1.0, bandwidth=math.inf)
    assert cost.all_reduce_time(slow, 5, 1) == cost.all_reduce_time(slow, 5, 1e12) == 8


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, EXCHANGE),
        ({"bits": 8}, 6 * (0.001 + 0.0025)),
        # Each of two fragments pays the latency.
        ({"fragments": 2}, 2 * 6 * (0.001 + 0.005)),
        # Three steps hide 30 ms of 66 ms, seven all of them.
        ({"overlap": 3}, EXCHANGE - 0.03),
        ({"overlap": 7}, 0),
        ({"overlap": 7, "overhead": 0.002}, 0.002),
        ({"fragments": 2, "overlap": 3}, 2 * (6 * 0.006 - 0.03)),
        ({"workers": 1}, 0),
    ],
)
def test_what_workers_wait_for(changes, expected):
    wait = cost.waiting_time(JOB._replace(**changes), LINK)
    assert math.isclose(wait, expected, abs_tol=1e-15)


@pytest.mark.parametrize("period", [1, 3, 64])
def test_a_round_is_its_steps_and_the_wait(period):
    seconds = cost.round_time(JOB, LINK, period)
    assert math.isclose(seconds, period * 0.01 + EXCHANGE)
    assert math.isclose(cost.share(JOB, LINK, period), EXCHANGE / seconds)
    per_step = period * (0.01 + EXCHANGE) / seconds
    assert math.isclose(cost.speedup(JOB, LINK, period), per_step)


def test_averaging_at_each_step_is_the_unit_of_speedup():
    assert cost.speedup(JOB, LINK, 1) == 1
    assert cost.speedup(JOB._replace(bits=8), LINK, 1) > 2


@pytest.mark.parametrize("most", [0.5, 0.1, 0.03])
@pytest.mark.parametrize("changes", [{}, {"bits": 4}, {"fragments": 3, "overlap": 1}])
def test_the_period_for_a_share_is_the_shortest(most, changes):
    job = JOB._replace(**changes)
    period = cost.period_for_share(job, LINK, most)
    assert cost.share(job, LINK, period) <= most
    if period > max(1, job.overlap):
        assert cost.share(job, LINK, period - 1) > most


def test_a_fragment_arrives_within_its_round():
    job = JOB._replace(overlap=50)
    assert cost.period_for_share(job, LINK, 0.1) == 50
    with pytest.raises(ValueError, match="overlap must be at most the period"):
        cost.round_time(job, LINK, 49)


def test_advice_heeds_the_statistics():
    free = cost.advise(JOB, LINK, 0.1)
    assert (free.period, free.capped) == (60, False)
    assert cost.advise(JOB, LINK, 0.1, longest=100) == free
    capped = cost.advise(JOB, LINK, 0.1, longest=20)
    assert (capped.period, capped.capped) == (20, True)
    assert capped.share > 0.1 and capped.speedup < free.speedup


@pytest.mark.parametrize("workers", [2, 8])
def test_a_link_is_found_from_its_times(workers):
    sizes = [1e3, 1e5, 1e7]
    times = [cost.all_reduce_time(LINK, workers, size) for size in sizes]
    found = cost.fit_link(workers, sizes, times)
    assert math.isclose(found.latency, LINK.latency, rel_tol=1e-9)
    assert math.isclose(found.bandwidth, LINK.bandwidth, rel_tol=1e-9)


def test_a_link_without_latency():
    found = cost.fit_link(2, [1e6, 2e6], [1.0, 2.1])
    assert found.latency == 0 and found.bandwidth > 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cost.all_reduce_time(LINK, 0, 1), "workers must be at least 1, got 0"),
        (
            lambda: cost.all_reduce_time(cost.Link(-1, 1), 2, 1),
            "latency must be at least 0 .* got -1 and 1",
        ),
        (
            lambda: cost.all_reduce_time(cost.Link(0, 0), 2, 1),
            "bandwidth positive, got 0 and 0",
        ),
        (lambda: cost.waiting_time(JOB._replace(compute=0), LINK), "positive, got 0"),
        (lambda: cost.waiting_time(JOB._replace(bits=0), LINK), "positive, got 0.01 a"),
        (
            lambda: cost.waiting_time(JOB._replace(parameters=0), LINK),
            "parameters must be at least 1, got 0",
        ),
        (
            lambda: cost.waiting_time(JOB._replace(fragments=0), LINK),
            "fragments must be at least 1, got 0",
        ),
        (
            lambda: cost.waiting_time(JOB._replace(overlap=-1), LINK),
            "overlap must be at least 0, got -1",
        ),
        (
            lambda: cost.waiting_time(JOB._replace(overhead=-1.0), LINK),
            "overhead must be at least 0, got -1",
        ),
        (lambda: cost.round_time(JOB, LINK, 0), "period must be at least 1, got 0"),
        (lambda: cost.period_for_share(JOB, LINK, 1), r"must be in \(0, 1\), got 1"),
        (lambda: cost.advise(JOB, LINK, 0.1, 0), "longest period must be|longest must"),
        (lambda: cost.fit_link(1, [1, 2], [1, 2]), "workers must be at least 2, got 1"),
        (lambda: cost.fit_link(2, [1, 1], [1, 2]), "two sizes and a time for each"),
        (lambda: cost.fit_link(2, [1, 2], [1]), "two sizes and a time for each"),
        (lambda: cost.fit_link(2, [1, 9], [2, 1]), "more bytes must take longer"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
