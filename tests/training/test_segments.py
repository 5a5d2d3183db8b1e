"""Plan of the dispatches of a run."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import localsgd_jax as lsgd
from localsgd_jax.training.callbacks import Callbacks
from localsgd_jax.training.run_context import RunContext, RunSettings
from localsgd_jax.training.segments import next_segment, segments


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(
        st.integers(1, 9).map(lsgd.every),
        st.sets(st.integers(1, 60), min_size=1).map(lsgd.at_steps),
        st.builds(lsgd.post_local, st.integers(0, 20), st.integers(1, 9)),
        st.integers(1, 9).map(lsgd.geometric),
    ),
    st.integers(0, 30),
    st.integers(1, 40),
    st.integers(1, 12),
)
def test_segment_follows_the_schedule(schedule, start, limit, max_steps):
    segment = next_segment(schedule, start, limit, max_steps)
    steps, period = segment.steps, segment.period
    assert 1 <= steps <= min(limit, max_steps)
    assert segment.end_step == start + steps
    assert segment.due == tuple(schedule(start + i) for i in range(1, steps + 1))
    if period is not None:
        assert segment.due == tuple(i % period == 0 for i in range(1, steps + 1))
        assert steps in (period, max_steps // period * period)


def steps_and_periods(schedule, num_steps, max_steps=64, **options):
    """Returns the steps and the period of each segment of a run."""
    result, step = [], 0
    while step < num_steps:
        limit = min(max_steps, num_steps - step)
        segment = next_segment(schedule, step, limit, max_steps, **options)
        step = segment.end_step
        result.append(segment[:2])
    return result


def test_short_rounds_share_a_dispatch():
    assert next_segment(lsgd.every(4), 0, 64, 64)[:2] == (64, 4)
    assert next_segment(lsgd.every(4), 0, 63, 64)[:2] == (4, 4)
    alone = steps_and_periods(lsgd.every(4), 8, rounds_are_alike=False)
    assert alone == [(4, 4), (4, 4)]


@pytest.mark.parametrize(
    "period, expected",
    [
        (100, [(36, None), (64, 64)]),
        (128, [(64, None), (64, 64)]),
        (200, [(8, None), (64, None), (64, None), (64, 64)]),
        (1000, [(32, None), (8, None), *[(64, None)] * 14, (64, 64)]),
    ],
)
def test_long_rounds_end_with_a_full_dispatch(period, expected):
    """A length beyond the steps that are searched is a sum of powers of two."""
    assert steps_and_periods(lsgd.every(period), 2 * period) == 2 * expected


def test_recurring_lengths_are_not_divided():
    schedule = lsgd.with_lead(lsgd.evenly_spaced(30, 4), 5)
    rounds = steps_and_periods(schedule, 60)
    assert rounds == [(n, n) for n in (2, 5, 3, 5, 2, 5, 3, 5)] * 2


def test_other_lengths_are_sums_of_powers_of_two():
    segments = steps_and_periods(lsgd.at_steps([7, 20]), 30)
    assert segments[:3] == [(2, None), (1, None), (4, 4)]
    assert segments[3:6] == [(4, None), (1, None), (8, 8)]
    assert segments[6:] == [(8, None), (2, None)]


@pytest.mark.parametrize("seed", range(4))
def test_irregular_schedule_has_few_programs(seed):
    steps = np.random.default_rng(seed).choice(2000, 30, replace=False) + 1
    programs = set(steps_and_periods(lsgd.at_steps(sorted(steps.tolist())), 2000))
    assert len(programs) <= 16


def plan(num_batches, step=0, round_number=0, **options):
    """Returns end step, evaluation and saving of each segment of a run, period 4."""
    context = RunContext([0], True, step, round_number)
    left = [num_batches]
    result = []
    run_settings = RunSettings(lsgd.every(4), None, None, 16)
    plan = segments(run_settings, context, Callbacks(**options), lambda: left[0])
    for segment in plan:
        left[0] -= segment.steps
        result.append((segment.end_step, segment.evaluates, segment.saves))
    return result


def test_segments_end_at_evaluations():
    assert plan(24, evaluate=len, evaluate_every=3) == [
        (4, False, False),
        (8, False, False),
        (12, True, False),
        (16, False, False),
        (20, False, False),
        (24, True, False),
    ]


def test_segments_end_at_saves_within_a_round():
    ends = [(end, saves) for end, _, saves in plan(12, save=len, save_every=6)]
    assert [end for end, saves in ends if saves] == [6, 12]
    assert ends[-1] == (12, True)


def test_evaluations_and_saves_are_counted_from_step_0():
    options = {"evaluate": len, "evaluate_every": 3, "save": len, "save_every": 16}
    complete = plan(48, **options)
    resumed = plan(40, step=8, round_number=2, **options)
    due = [entry for entry in complete if any(entry[1:]) and entry[0] > 8]
    assert [entry for entry in resumed if any(entry[1:])] == due
