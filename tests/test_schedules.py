"""Schedules are exact from the first round on, for Python and for traced ints."""

import jax
import jax.numpy as jnp
import optax
import pytest

import localsgd_jax as lsgd

HALVED = optax.piecewise_constant_schedule(0.2, {8: 0.5})

# schedule, synchronisation indices up to 20, longest round
TABLE = [
    (lsgd.every(1), list(range(1, 21)), 1),
    (lsgd.every(4), [4, 8, 12, 16, 20], 4),
    (lsgd.every(7), [7, 14], 7),
    (lsgd.never(), [], 20),
    (lsgd.at([3]), [3], 17),
    (lsgd.at([9, 2, 3, 2]), [2, 3, 9], 11),
    (lsgd.at([25]), [], 20),
    (lsgd.post_local(0, 6), [6, 12, 18], 6),
    (lsgd.post_local(3, 6), [1, 2, 3, 9, 15], 6),
    (lsgd.post_local(20, 6), list(range(1, 21)), 1),
    (lsgd.growing(1), list(range(1, 21)), 1),
    (lsgd.growing(4), [1, 3, 7, 11, 15, 19], 4),
    (lsgd.growing(4, rounds=2), [1, 2, 4, 6, 10, 14, 18], 4),
    (lsgd.growing(5, factor=3), [1, 4, 9, 14, 19], 5),
    (lsgd.quadratic(lambda t: 0.1, alpha=0.05, h_base=3), [3, 6, 9, 12, 15, 18], 3),
    (lsgd.quadratic(lambda t: 0.1, alpha=0.2, h_base=3), [4, 8, 12, 16, 20], 4),
    (lsgd.quadratic(HALVED, alpha=0.3, h_base=4), [4, 8, 17], 9),
    (lsgd.quadratic(lambda t: 0.0, alpha=0.3, h_base=4), [], 20),
]
table = pytest.mark.parametrize(
    "schedule, steps, gap", TABLE, ids=lambda x: repr(x)[:40]
)


@table
def test_python_ints(schedule, steps, gap):
    assert schedule.steps(20) == steps
    assert schedule.gap(20) == gap
    assert all(isinstance(schedule(t), bool) for t in range(21))
    assert schedule(0) is False


@table
def test_traced_ints(schedule, steps, gap):
    due = jax.jit(lambda t: jnp.asarray(schedule(t)))
    assert [t for t in range(21) if due(jnp.int32(t))] == steps
    assert due._cache_size() == 1


def test_quadratic_counts_the_same_on_the_host_and_in_the_graph():
    """(0.4 / 0.1)² is 16 on paper, and 15.999999 or 16.000002 in float32."""
    schedule = lsgd.quadratic(optax.cosine_decay_schedule(0.1, 400), 0.4, 2)
    due = jax.jit(jax.vmap(lambda t: jnp.asarray(schedule(t))))
    graph = due(jnp.arange(401))
    assert schedule.steps(400) == jnp.flatnonzero(graph).tolist()
    assert schedule.steps(400)[0] == 16


def test_quadratic_decides_at_the_start_of_a_round():
    """The rate falls at step 6, within the round 6 to 10, which keeps its length."""
    falling = optax.piecewise_constant_schedule(0.2, {6: 0.5})
    schedule = lsgd.quadratic(falling, alpha=0.3, h_base=5)
    assert schedule.steps(30) == [5, 10, 19, 28]


def test_quadratic_inside_a_trace_still_answers_python_ints():
    schedule = lsgd.quadratic(HALVED, alpha=0.3, h_base=4)
    seen = []
    jax.jit(lambda x: seen.append(schedule(17)) or x)(1.0)
    assert seen == [True]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lsgd.every(0), r"every\(h\): h must be at least 1, got 0"),
        (lambda: lsgd.every(2.5), r"every\(h\): h must be an int, got 2.5"),
        (lambda: lsgd.every(True), "must be an int, got True"),
        (lambda: lsgd.at([]), r"at\(steps\): at least one step is needed, got none"),
        (lambda: lsgd.at([3, 0]), r"at\(steps\): each step must be at least 1, got 0"),
        (lambda: lsgd.post_local(-1, 4), "switch must be at least 0, got -1"),
        (lambda: lsgd.post_local(3, 0), "h must be at least 1, got 0"),
        (lambda: lsgd.growing(0), r"growing\(h\): h must be at least 1, got 0"),
        (lambda: lsgd.growing(4, rounds=0), "rounds must be at least 1, got 0"),
        (lambda: lsgd.growing(4, factor=1), "factor must be at least 2, got 1"),
        (lambda: lsgd.quadratic(0.1, 0.2, 4), "not callable: 0.1"),
        (lambda: lsgd.quadratic(HALVED, 0.0, 4), "alpha must be positive, got 0.0"),
        (lambda: lsgd.quadratic(HALVED, float("nan"), 4), "positive, got nan"),
        (lambda: lsgd.quadratic(HALVED, 0.2, 0), "h_base must be at least 1, got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
