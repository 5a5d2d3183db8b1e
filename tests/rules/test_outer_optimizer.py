"""Outer optimizers against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.rule_arrays import (
    K,
    N,
    random_rounds,
    set_params_algorithm,
    sync_arrays,
    sync_tree,
    weighted_mean,
    weights_of_round,
    with_and_without_weights,
)

import localsgd_jax as lsgd


@with_and_without_weights
@pytest.mark.parametrize(
    "rule, rate, decay, nesterov",
    [
        (lsgd.diloco(), 0.7, 0.9, True),
        (lsgd.slowmo(), 1.0, 0.7, False),
        (lsgd.fedavgm(0.5), 0.5, 0.9, False),
        (lsgd.lookahead(0.4), 0.4, 0.0, False),
        (lsgd.outer(optax.sgd(1.0), "worker"), 1.0, 0.0, False),
    ],
    ids=["diloco", "slowmo", "fedavgm", "lookahead", "mean"],
)
def test_outer_sgd(rule, rate, decay, nesterov, weights):
    synced, _ = sync_arrays(rule, random_rounds(), weights)
    anchor, velocity = np.zeros(N), np.zeros(N)
    for i, x in enumerate(random_rounds()):
        delta = anchor - weighted_mean(x, weights_of_round(weights, i))
        velocity = decay * velocity + delta
        anchor = anchor - rate * (delta + decay * velocity if nesterov else velocity)
        np.testing.assert_allclose(synced[i], np.tile(anchor, (K, 1)), atol=1e-5)


def test_fedadam():
    synced, _ = sync_arrays(lsgd.fedadam(0.1, 0.9, 0.99, 1e-3), random_rounds())
    anchor, m, v = np.zeros(N), 0.0, 0.0
    for t, x in enumerate(random_rounds(), 1):
        delta = anchor - x.mean(0)
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-3)
        anchor = anchor - 0.1 * step
        np.testing.assert_allclose(synced[t - 1][0], anchor, atol=1e-5)


def test_outer_learning_rate_schedule_counts_rounds():
    rate = optax.piecewise_constant_schedule(1.0, {2: 0.0})
    synced, _ = sync_arrays(lsgd.outer(optax.sgd(rate)), random_rounds())
    np.testing.assert_allclose(synced[1][0], random_rounds()[1].mean(0), atol=1e-6)
    np.testing.assert_array_equal(synced[3], synced[1])


def test_anchor_of_half_precision_params_is_float32():
    """Steps of 1/1024 would be lost in bfloat16 parameters near 1."""
    cluster = lsgd.simulate(set_params_algorithm(lsgd.outer(optax.sgd(1 / 256))), 2)
    state = cluster.init({"params": jnp.ones(3, jnp.bfloat16)})
    for _ in range(8):
        state, _ = cluster.step(state, jnp.full((2, 3), 1.25, jnp.bfloat16))
        state = cluster.sync(state)
    anchor = state.shared["params"].anchor
    expected = 1.25 - 0.25 * (255 / 256) ** 8
    np.testing.assert_allclose(anchor, np.full(3, expected), rtol=1e-6)
    assert state.workers["params"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: lsgd.outer(0.7), TypeError, r"outer\(optimizer\): .* got 0.7"),
        (
            lambda: lsgd.outer(optax.sgd(1.0), 3),
            TypeError,
            r"outer\(reduce\): .* got 3",
        ),
        (
            lambda: lsgd.diloco(float("nan")),
            ValueError,
            r"diloco\(learning_rate\): learning_rate must be at least 0, got nan",
        ),
        (
            lambda: lsgd.slowmo(float("inf")),
            ValueError,
            r"slowmo\(learning_rate\): learning_rate must be finite, got inf",
        ),
        (
            lambda: lsgd.lookahead(float("nan")),
            ValueError,
            r"lookahead\(slow_step_size\): slow_step_size must be at least 0, got nan",
        ),
        (
            lambda: sync_tree(lsgd.outer(optax.sgd(1.0), lsgd.identity())),
            ValueError,
            "RuleState.shared must not depend on per-worker values",
        ),
        (
            lambda: sync_tree(lsgd.outer(optax.sgd(1.0), "pod")),
            ValueError,
            r"rule\(axis='pod'\): every axis must be a worker axis of",
        ),
        (
            lambda: sync_tree(lsgd.diloco(), {"n": jnp.arange(3)}),
            TypeError,
            r"outer\(\): every leaf must be floating point.*int32 at \['n'\]",
        ),
    ],
)
def test_invalid_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
