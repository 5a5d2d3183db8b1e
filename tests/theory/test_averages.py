"""Step sizes, weights and weighted averages of the theorems."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from localsgd_jax import theory


@pytest.mark.parametrize("count", [0, 1, 999, np.int32(7)])
def test_stepsize_of_python_and_traced_counts(count):
    schedule = theory.stepsize(mu=0.5, a=97)
    expected = 4 / (0.5 * (97 + count))
    assert schedule(count) == expected
    np.testing.assert_allclose(jax.jit(schedule)(count), expected, rtol=1e-6)


def test_stepsize_is_an_optax_schedule():
    optimizer = optax.sgd(theory.stepsize(mu=2.0, a=10))
    state = optimizer.init(jnp.zeros(()))
    for t in range(3):
        update, state = optimizer.update(jnp.ones(()), state)
        np.testing.assert_allclose(update, -2.0 / (10 + t), rtol=1e-6)


@pytest.mark.parametrize(
    ("mu", "smoothness", "period", "delay", "expected"),
    [(1, 1, 4, 0, 17), (1, 1, 16, 0, 17), (1, 1, 17, 0, 18), (1, 1, 16, 4, 21)]
    + [(0.5, 3.0, 1, 0, 97), (2.0, 2.1, 5, 5, 17)],
)
def test_shift_is_the_smallest_allowed(mu, smoothness, period, delay, expected):
    a = theory.shift(mu, smoothness, period, delay)
    assert a == expected
    assert a > max(16 * smoothness / mu, period + delay) >= a - 1
    eta = theory.stepsize(mu, a)
    assert eta(0) <= 1 / (4 * smoothness)
    assert all(eta(t) <= 2 * eta(t + period + delay) for t in range(100))


@pytest.mark.parametrize("a", [1, 3, 17.5, 526_321])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_weights_exceed_int32(a, power):
    weight = theory.weights(a, power)
    for t in (0, 1, 50):
        assert weight(t) == (a + t) ** power
        np.testing.assert_allclose(jax.jit(weight)(t), float(a + t) ** power, rtol=1e-6)


@pytest.mark.parametrize(
    ("steps", "a", "expected"), [(7, 3, 280), (100, 50, 1_073_350), (1, 17, 289)]
)
def test_weight_sum_matches_the_paper(steps, a, expected):
    assert theory.weight_sum(steps, a) == expected


@pytest.mark.parametrize("a", [1, 2, 17, 33.5, 526_321])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_weight_sum_is_the_sum_of_the_weights(steps, a):
    weight = theory.weights(a)
    total = theory.weight_sum(steps, a)
    assert total == pytest.approx(math.fsum(map(weight, range(steps))), rel=1e-13)
    assert total >= steps**3 / 3


@pytest.mark.parametrize(
    ("a", "power"), [(17, 2), (0.5, 2), (526_321, 2), (1, 1), (1, 0)]
)
@pytest.mark.parametrize("steps", [1, 2, 60])
def test_running_average_is_the_weighted_sum(steps, a, power):
    rng = np.random.default_rng(steps)
    path = {"w": rng.normal(size=(steps, 4, 3)), "b": rng.normal(size=(steps, 4))}
    average = theory.running_average(theory.weights(a, power))

    @jax.jit
    def run(path):
        first = jax.tree.map(lambda x: x[0], path)
        return jax.lax.scan(
            lambda state, x: (average.update(state, x), None), average.init(first), path
        )[0]

    with jax.enable_x64(True):
        state = run(path)
    w = np.array([(a + t) ** power for t in range(steps)], float)
    for name, value in path.items():
        expected = np.tensordot(w, value, 1) / w.sum()
        np.testing.assert_allclose(state.mean[name], expected, rtol=1e-12, atol=1e-14)
    assert state.step == steps
    np.testing.assert_allclose(state.total, w.sum(), rtol=1e-12)


def test_mean_of_running_averages_is_the_output_of_the_theorem():
    path = np.random.default_rng(0).normal(size=(20, 8, 3)).astype(np.float32)
    average = theory.running_average(theory.weights(34))
    update = jax.jit(jax.vmap(average.update))
    state = jax.vmap(average.init)(path[0])
    for x in path:
        state = update(state, x)
    w = (34.0 + np.arange(20)) ** 2
    expected = np.einsum("t,tkd->d", w, path) / (8 * theory.weight_sum(20, 34))
    np.testing.assert_allclose(state.mean.mean(0), expected, rtol=1e-5, atol=1e-6)


def test_running_average_of_bfloat16_is_float32():
    path = jnp.arange(1000).astype(jnp.bfloat16) % 2
    average = theory.running_average(theory.weights(1, power=0))
    state = average.init(path[0])  # Scan raises if the dtype of the state changes.
    state, _ = jax.lax.scan(lambda s, x: (average.update(s, x), None), state, path)
    assert state.mean.dtype == jnp.float32
    np.testing.assert_allclose(state.mean, np.mean(path, dtype=float), rtol=1e-5)
