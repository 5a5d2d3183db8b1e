"""Plan of the dispatches of a run."""

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
    if period is None:
        assert steps in (1, max_steps)
    else:
        assert segment.due == tuple(i % period == 0 for i in range(1, steps + 1))
        assert steps in (period, max_steps // period * period)


def test_regular_rounds_are_fused_and_irregular_ones_gated():
    at_steps = lsgd.at_steps([5, 9])
    assert next_segment(lsgd.every(4), 0, 64, 64)[:2] == (64, 4)
    assert next_segment(lsgd.every(4), 0, 63, 64)[:2] == (4, 4)
    assert next_segment(lsgd.every(4), 2, 64, 64)[:2] == (64, None)
    assert next_segment(at_steps, 0, 64, 64)[:2] == (64, None)
    assert next_segment(at_steps, 0, 30, 64)[:2] == (1, None)
    assert next_segment(lsgd.every(100), 0, 64, 64)[:2] == (64, None)


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
