"""Cost model against hand computations, and its input validation."""

import math

import pytest

from localsgd_jax.planning import cost_model

WORKLOAD = cost_model.Workload(workers=4, step_seconds=0.01, parameters=1_000_000)
LINK = cost_model.Link(latency=0.001, bandwidth=1e8)
# 4 MB among four: six messages of 1 MB.
ALL_REDUCE = 6 * (0.001 + 0.01)


def test_all_reduce_of_four_workers_is_six_messages():
    assert math.isclose(cost_model.all_reduce_time(LINK, 4, 4e6), ALL_REDUCE)
    assert cost_model.all_reduce_time(LINK, 1, 4e6) == 0


def test_latency_does_not_depend_on_the_size():
    slow = cost_model.Link(latency=1.0, bandwidth=1e300)
    assert (
        cost_model.all_reduce_time(slow, 5, 1)
        == cost_model.all_reduce_time(slow, 5, 1e12)
        == 8
    )


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, ALL_REDUCE),
        ({"bits": 8}, 6 * (0.001 + 0.0025)),
        # Each of two fragments takes the full latency.
        ({"fragments": 2}, 2 * 6 * (0.001 + 0.005)),
        # Three steps hide 30 ms of 66 ms, seven all of them.
        ({"overlap_steps": 3}, ALL_REDUCE - 0.03),
        ({"overlap_steps": 7}, 0),
        ({"overlap_steps": 7, "overhead_seconds": 0.002}, 0.002),
        ({"fragments": 2, "overlap_steps": 3}, 2 * (6 * 0.006 - 0.03)),
        ({"workers": 1}, 0),
    ],
)
def test_exposed_communication_matches_hand_computation(changes, expected):
    exposed = cost_model.exposed_communication_seconds(
        WORKLOAD._replace(**changes), LINK
    )
    assert math.isclose(exposed, expected, abs_tol=1e-15)


@pytest.mark.parametrize("period", [1, 3, 64])
def test_round_is_steps_plus_exposed_communication(period):
    seconds = cost_model.round_time(WORKLOAD, LINK, period)
    assert math.isclose(seconds, period * 0.01 + ALL_REDUCE)
    assert math.isclose(
        cost_model.exposed_communication_fraction(WORKLOAD, LINK, period),
        ALL_REDUCE / seconds,
    )
    per_step = period * (0.01 + ALL_REDUCE) / seconds
    assert math.isclose(cost_model.speedup(WORKLOAD, LINK, period), per_step)


def test_speedup_of_averaging_at_every_step_is_one():
    assert cost_model.speedup(WORKLOAD, LINK, 1) == 1
    assert cost_model.speedup(WORKLOAD._replace(bits=8), LINK, 1) > 2


@pytest.mark.parametrize("max_fraction", [0.5, 0.1, 0.03])
@pytest.mark.parametrize(
    "changes", [{}, {"bits": 4}, {"fragments": 3, "overlap_steps": 1}]
)
def test_period_for_communication_fraction_is_the_shortest(max_fraction, changes):
    workload = WORKLOAD._replace(**changes)
    period = cost_model.period_for_communication_fraction(workload, LINK, max_fraction)
    assert (
        cost_model.exposed_communication_fraction(workload, LINK, period)
        <= max_fraction
    )
    if period > max(1, workload.overlap_steps):
        assert (
            cost_model.exposed_communication_fraction(workload, LINK, period - 1)
            > max_fraction
        )


def test_overlap_longer_than_a_round_raises():
    workload = WORKLOAD._replace(overlap_steps=50)
    assert cost_model.period_for_communication_fraction(workload, LINK, 0.1) == 50
    with pytest.raises(ValueError, match="overlap_steps must be at most the period"):
        cost_model.round_time(workload, LINK, 49)


def test_recommendation_is_limited_by_theory():
    unlimited = cost_model.recommend_period(WORKLOAD, LINK, 0.1)
    assert (unlimited.period, unlimited.limited_by_theory) == (60, False)
    assert cost_model.recommend_period(WORKLOAD, LINK, 0.1, max_period=100) == unlimited
    limited = cost_model.recommend_period(WORKLOAD, LINK, 0.1, max_period=20)
    assert (limited.period, limited.limited_by_theory) == (20, True)
    assert limited.communication_fraction > 0.1 and limited.speedup < unlimited.speedup


@pytest.mark.parametrize("workers", [2, 8])
def test_fit_link_recovers_the_link(workers):
    sizes = [1e3, 1e5, 1e7]
    times = [cost_model.all_reduce_time(LINK, workers, size) for size in sizes]
    fitted = cost_model.fit_link(workers, sizes, times)
    assert math.isclose(fitted.latency, LINK.latency, rel_tol=1e-9)
    assert math.isclose(fitted.bandwidth, LINK.bandwidth, rel_tol=1e-9)


def test_negative_latency_becomes_zero():
    fitted = cost_model.fit_link(2, [1e6, 2e6], [1.0, 2.1])
    assert fitted.latency == 0 and fitted.bandwidth > 0


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: cost_model.all_reduce_time(LINK, 0, 1),
            "workers must be at least 1, got 0",
        ),
        (
            lambda: cost_model.all_reduce_time(cost_model.Link(-1, 1), 2, 1),
            "latency must be at least 0, got -1",
        ),
        (
            lambda: cost_model.all_reduce_time(cost_model.Link(0, 0), 2, 1),
            "bandwidth must be positive, got 0",
        ),
        (
            lambda: cost_model.exposed_communication_seconds(
                WORKLOAD._replace(step_seconds=0), LINK
            ),
            "step_seconds must be positive, got 0",
        ),
        (
            lambda: cost_model.exposed_communication_seconds(
                WORKLOAD._replace(bits=0), LINK
            ),
            "bits must be positive, got 0",
        ),
        (
            lambda: cost_model.exposed_communication_seconds(
                WORKLOAD._replace(parameters=0), LINK
            ),
            "parameters must be at least 1, got 0",
        ),
        (
            lambda: cost_model.exposed_communication_seconds(
                WORKLOAD._replace(fragments=0), LINK
            ),
            "fragments must be at least 1, got 0",
        ),
        (
            lambda: cost_model.exposed_communication_seconds(
                WORKLOAD._replace(overlap_steps=-1), LINK
            ),
            "overlap_steps must be at least 0, got -1",
        ),
        (
            lambda: cost_model.exposed_communication_seconds(
                WORKLOAD._replace(overhead_seconds=-1.0), LINK
            ),
            "overhead_seconds must be at least 0, got -1",
        ),
        (
            lambda: cost_model.round_time(WORKLOAD, LINK, 0),
            "period must be at least 1, got 0",
        ),
        (
            lambda: cost_model.period_for_communication_fraction(WORKLOAD, LINK, 1),
            r"max_fraction must be in \(0, 1\), got 1",
        ),
        (
            lambda: cost_model.recommend_period(WORKLOAD, LINK, 0.1, 0),
            "max_period must be at least 1, got 0",
        ),
        (
            lambda: cost_model.fit_link(1, [1, 2], [1, 2]),
            "workers must be at least 2, got 1",
        ),
        (
            lambda: cost_model.fit_link(2, [1, 1], [1, 2]),
            "at least two sizes and one time for each",
        ),
        (
            lambda: cost_model.fit_link(2, [1, 2], [1]),
            "at least two sizes and one time for each",
        ),
        (
            lambda: cost_model.fit_link(2, [1, 9], [2, 1]),
            "times must increase with the sizes",
        ),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
