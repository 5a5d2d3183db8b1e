"""Schedules: exact synchronisation indices, for Python and for traced ints."""

import jax
import jax.numpy as jnp
import optax
import pytest

import localsgd_jax as lsgd
from localsgd_jax.schedules.per_worker import resolve_schedules

HALVED = optax.piecewise_constant_schedule(0.2, {8: 0.5})

# Schedule, synchronisation indices up to 20, length of the longest round.
SCHEDULES = [
    (lsgd.every(1), list(range(1, 21)), 1),
    (lsgd.every(4), [4, 8, 12, 16, 20], 4),
    (lsgd.every(7), [7, 14], 7),
    (lsgd.never(), [], 20),
    (lsgd.at_steps([3]), [3], 17),
    (lsgd.at_steps([9, 2, 3, 2]), [2, 3, 9], 11),
    (lsgd.at_steps([25]), [], 20),
    (lsgd.post_local(0, 6), [6, 12, 18], 6),
    (lsgd.post_local(3, 6), [1, 2, 3, 9, 15], 6),
    (lsgd.post_local(20, 6), list(range(1, 21)), 1),
    (lsgd.geometric(1), list(range(1, 21)), 1),
    (lsgd.geometric(4), [1, 3, 7, 11, 15, 19], 4),
    (lsgd.geometric(4, rounds=2), [1, 2, 4, 6, 10, 14, 18], 4),
    (lsgd.geometric(5, factor=3), [1, 4, 9, 14, 19], 5),
    (lsgd.qsr(lambda t: 0.1, alpha=0.05, h_base=3), [3, 6, 9, 12, 15, 18], 3),
    (lsgd.qsr(lambda t: 0.1, alpha=0.2, h_base=3), [4, 8, 12, 16, 20], 4),
    (lsgd.qsr(HALVED, alpha=0.3, h_base=4), [4, 8, 17], 9),
    (lsgd.qsr(lambda t: 0.0, alpha=0.3, h_base=4), [], 20),
    (lsgd.evenly_spaced(6, 1), [6, 12, 18], 6),
    (lsgd.evenly_spaced(10, 4), [2, 5, 7, 10, 12, 15, 17, 20], 3),
    (lsgd.with_lead(lsgd.evenly_spaced(7, 1), 2), [5, 7, 12, 14, 19], 5),
    (lsgd.with_lag(lsgd.evenly_spaced(7, 1), 2), [7, 9, 14, 16], 7),
]
each_schedule = pytest.mark.parametrize(
    "schedule, steps, gap", SCHEDULES, ids=lambda x: repr(x)[:40]
)


@each_schedule
def test_python_ints(schedule, steps, gap):
    assert schedule.steps(20) == steps
    assert schedule.gap(20) == gap
    assert all(isinstance(schedule(t), bool) for t in range(21))
    assert schedule(0) is False


@each_schedule
def test_traced_ints(schedule, steps, gap):
    due = jax.jit(lambda t: jnp.asarray(schedule(t)))
    assert [t for t in range(21) if due(jnp.int32(t))] == steps
    assert due._cache_size() == 1


def test_qsr_is_equal_for_python_and_traced_ints():
    """Checks a ratio of exactly 16, which is 15.999999 or 16.000002 in float32."""
    schedule = lsgd.qsr(optax.cosine_decay_schedule(0.1, 400), 0.4, 2)
    due = jax.jit(jax.vmap(lambda t: jnp.asarray(schedule(t))))
    traced = due(jnp.arange(401))
    assert schedule.steps(400) == jnp.flatnonzero(traced).tolist()
    assert schedule.steps(400)[0] == 16


def test_qsr_tolerates_float32_division():
    """0.9/0.3 is 2.9999998 in float32, and its square must not round down to 8."""
    schedule = lsgd.qsr(optax.constant_schedule(0.3), 0.9, 2)
    assert schedule.steps(27) == [9, 18, 27]


def test_qsr_fixes_the_length_at_the_start_of_a_round():
    """The rate falls at step 6, within the round 6 to 10, which keeps its length."""
    falling = optax.piecewise_constant_schedule(0.2, {6: 0.5})
    schedule = lsgd.qsr(falling, alpha=0.3, h_base=5)
    assert schedule.steps(30) == [5, 10, 19, 28]


def test_qsr_accepts_python_ints_inside_a_trace():
    schedule = lsgd.qsr(HALVED, alpha=0.3, h_base=4)
    results = []
    jax.jit(lambda x: results.append(schedule(17)) or x)(1.0)
    assert results == [True]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lsgd.every(0), r"every\(h\): h must be at least 1, got 0"),
        (lambda: lsgd.every(2.5), r"every\(h\): h must be an int, got 2.5"),
        (lambda: lsgd.every(True), "must be an int, got True"),
        (
            lambda: lsgd.at_steps([]),
            r"at_steps\(steps\): at least one step is needed, got none",
        ),
        (
            lambda: lsgd.at_steps([3, 0]),
            r"at_steps\(steps\): each step must be at least 1, got 0",
        ),
        (lambda: lsgd.post_local(-1, 4), "switch must be at least 0, got -1"),
        (lambda: lsgd.post_local(3, 0), "h must be at least 1, got 0"),
        (lambda: lsgd.geometric(0), r"geometric\(h\): h must be at least 1, got 0"),
        (lambda: lsgd.geometric(4, rounds=0), "rounds must be at least 1, got 0"),
        (lambda: lsgd.geometric(4, factor=1), "factor must be at least 2, got 1"),
        (lambda: lsgd.qsr(0.1, 0.2, 4), "lr_schedule must be callable, got 0.1"),
        (lambda: lsgd.qsr(HALVED, 0.0, 4), "alpha must be positive, got 0.0"),
        (lambda: lsgd.qsr(HALVED, float("nan"), 4), "positive, got nan"),
        (lambda: lsgd.qsr(HALVED, 0.2, 0), "h_base must be at least 1, got 0"),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_resolve_schedules():
    call, schedule = "run(schedule)", lsgd.every(3)
    assert resolve_schedules(call, schedule, 2) == [schedule, schedule]
    resolved = resolve_schedules(call, [4, schedule], 2)
    assert repr(resolved) == "[every(4), every(3)]"
    with pytest.raises(ValueError, match=r"run\(schedule\): one schedule or 2.*got 3"):
        resolve_schedules(call, [1, 2, 3], 2)
    with pytest.raises(TypeError, match=r"a period or a schedule is needed, got 0.5"):
        resolve_schedules(call, 0.5, 2)


@pytest.mark.parametrize("rate", [0.0, 1e-30])
def test_qsr_limits_the_length_of_a_round(rate):
    schedule = lsgd.qsr(lambda t: rate, 0.3, 4)
    assert schedule(2**29) and not schedule(2**29 - 1)
    assert schedule(2**30) and not schedule(2**30 - 1)
