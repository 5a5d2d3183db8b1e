"""Eager outer steps against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.rule_arrays import (
    K,
    N,
    random_rounds,
    sync_tree,
    weights_of_round,
    with_and_without_weights,
)

import localsgd_jax as lsgd

NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)


def progress_cluster(rule, workers=K):
    """Returns workers with a local step that subtracts the batch."""
    descend = lambda x, delta: ({"params": x["params"] - delta}, {})  # noqa: E731
    return lsgd.simulate(lsgd.from_train_step(descend, rule), workers)


@with_and_without_weights
def test_eager_outer(weights):
    """The own pseudo-gradient at once, the other ones a round later."""
    cluster = progress_cluster(lsgd.eager_outer(NESTEROV))
    state = cluster.init({"params": jnp.zeros(N)})
    anchor, velocity, last = np.zeros((K, N)), np.zeros((K, N)), np.zeros((K, N))
    for i, delta in enumerate(random_rounds()):
        state, _ = cluster.step(state, jnp.asarray(delta, jnp.float32))
        state = cluster.sync(state, None if weights is None else weights[i])
        w = weights_of_round(weights, i)[:, None]
        share = w / w.sum()
        delta = np.where(w > 0, delta, 0)
        gradient = (share * last).sum(0) + share * (delta - last)
        velocity = 0.9 * velocity + gradient
        anchor = anchor - 0.7 * (gradient + 0.9 * velocity)
        last = delta
        np.testing.assert_allclose(state.workers["params"], anchor, atol=1e-5)


def test_one_worker_is_outer():
    states = []
    for rule in (lsgd.eager_outer(NESTEROV), lsgd.outer(NESTEROV)):
        cluster = progress_cluster(rule, 1)
        state = cluster.init({"params": jnp.zeros(N)})
        for delta in random_rounds(workers=1):
            state, _ = cluster.step(state, jnp.asarray(delta, jnp.float32))
            state = cluster.sync(state)
        states.append(state.workers["params"])
    np.testing.assert_allclose(*states, rtol=1e-5, atol=1e-6)


def test_workers_differ_by_their_share_of_one_round():
    """With SGD as the outer optimizer: x̄ₖ − x̄ⱼ = η (Δⱼ − Δₖ)/K of the last round."""
    cluster = progress_cluster(lsgd.eager_outer(optax.sgd(0.5)))
    state, rounds = cluster.init({"params": jnp.zeros(N)}), random_rounds(5)
    for delta in rounds:
        state, _ = cluster.step(state, jnp.asarray(delta, jnp.float32))
        state = cluster.sync(state)
    x, delta = np.asarray(state.workers["params"]), rounds[-1]
    expected = 0.5 * (delta[:1] - delta) / K
    np.testing.assert_allclose(x - x[:1], expected, atol=1e-5)


def test_invalid_arguments_raise():
    with pytest.raises(TypeError, match=r"eager_outer\(optimizer\)"):
        lsgd.eager_outer(0.1)
    with pytest.raises(TypeError, match=r"eager_outer\(reduce\)"):
        lsgd.eager_outer(NESTEROV, 3)
    with pytest.raises(TypeError, match="floating point"):
        sync_tree(lsgd.eager_outer(NESTEROV), {"n": jnp.zeros(3, int)})
    name = lsgd.eager_outer(optax.identity()).name
    assert name == "eager_outer(optimizer=identity, reduce=average())"


def test_rules_without_a_common_result_raise():
    made = lsgd.eager_outer(optax.sgd(0.7), lsgd.identity())
    cluster = lsgd.simulate(lsgd.from_train_step(lambda s, b: s, made), workers=2)
    with pytest.raises(ValueError, match=r"eager_outer\(reduce\): .* got identity"):
        cluster.sync(cluster.init({"params": jnp.zeros(2)}))
