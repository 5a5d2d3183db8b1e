"""Evenly spaced rounds and schedules with snapshots before or after them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localsgd_jax as lsgd


@pytest.mark.parametrize("h, n", [(36, 5), (10, 4), (8, 8), (7, 3), (500, 24), (5, 1)])
def test_every_fragment_has_one_round_in_h_steps(h, n):
    steps = lsgd.evenly_spaced(h, n).steps(3 * h)
    assert len(steps) == 3 * n and steps[n - 1 :: n] == [h, 2 * h, 3 * h]
    for p in range(n):
        assert np.diff(steps[p::n]).tolist() == [h, h]
    gaps = np.diff([0, *steps])
    assert gaps.max() - gaps.min() <= 1
    due = jax.jit(jax.vmap(lsgd.evenly_spaced(h, n)))(jnp.arange(1, 3 * h + 1))
    assert (np.flatnonzero(due) + 1).tolist() == steps


@pytest.mark.parametrize("schedule", [lsgd.every(6), lsgd.evenly_spaced(10, 3)])
@pytest.mark.parametrize(
    "delayed, offset", [(lsgd.with_lead, -2), (lsgd.with_lag, 2)], ids=["lead", "lag"]
)
def test_delayed_schedules_add_a_second_step_per_round(schedule, delayed, offset):
    due = delayed(schedule, 2)
    steps = due.steps(30)
    shifted = [t + offset for t in schedule.steps(40)]
    expected = sorted({*schedule.steps(30), *(t for t in shifted if t <= 30)})
    assert steps == expected
    traced = jax.jit(jax.vmap(due))(jnp.arange(1, 31))
    assert (np.flatnonzero(traced) + 1).tolist() == steps


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: lsgd.evenly_spaced(3, 4),
            ValueError,
            r"evenly_spaced\(h, n\): n must be at most h, got n = 4 and h = 3",
        ),
        (
            lambda: lsgd.with_lead(lsgd.evenly_spaced(10, 4), 2),
            ValueError,
            r"with_lead\(schedule, tau\): tau must be smaller than the 2 steps between "
            r"two indices of evenly_spaced\(10, 4\), got 2",
        ),
        (
            lambda: lsgd.with_lag(lsgd.every(6), 6),
            ValueError,
            r"with_lag\(schedule, tau\): tau must be smaller than the 6 steps .* got 6",
        ),
        (
            lambda: lsgd.with_lag(lsgd.every(6), 0),
            ValueError,
            r"with_lag\(tau\): tau must be at least 1, got 0",
        ),
        (
            lambda: lsgd.with_lag(6, 1),
            TypeError,
            r"with_lag\(schedule\): schedule must be a Schedule, got 6",
        ),
    ],
)
def test_invalid_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
