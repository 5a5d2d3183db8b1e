"""Delayed synchronisation against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from harness.rule_arrays import (
    K,
    N,
    random_rounds,
    sync_arrays,
    weighted_mean,
    weights_of_round,
    with_and_without_weights,
)

import localsgd_jax as lsgd


@with_and_without_weights
def test_overlap(weights):
    """The local step adds the batch, so that the parameters depend on the previous."""
    made = lsgd.from_train_step(
        lambda s, b: ({"params": s["params"] + b}, {}), lsgd.overlap(lsgd.average())
    )
    cluster = lsgd.simulate(made, K)
    state = cluster.init({"params": jnp.zeros(N)})
    x, snapshot = np.zeros((K, N)), np.zeros((K, N))
    for i, updates in enumerate(random_rounds()):
        w, before = weights_of_round(weights, i), x + updates
        mean = np.tile(weighted_mean(snapshot, w), (K, 1))
        x = np.where(w[:, None] > 0, mean + before - snapshot, mean)
        snapshot = x
        state, _ = cluster.step(state, updates.astype(np.float32))
        state = cluster.sync(state, None if weights is None else weights[i])
        np.testing.assert_allclose(state.workers["params"], x, atol=1e-5)
        if weights is None:
            np.testing.assert_allclose(x.mean(0), before.mean(0), atol=1e-12)


def test_delay_synchronises_the_snapshot():
    synced, _ = sync_arrays(lsgd.delay(lsgd.average()), random_rounds(4))
    x = random_rounds(4)
    np.testing.assert_allclose(synced[0], x[0], atol=1e-6)
    np.testing.assert_allclose(synced[1], np.tile(x[0].mean(0), (K, 1)), atol=1e-6)
    np.testing.assert_allclose(synced[3], np.tile(x[2].mean(0), (K, 1)), atol=1e-6)


def test_delay_keeps_the_snapshot_of_inactive_workers():
    x, start = random_rounds(2), np.ones(N)
    weights = [np.array([1.0, 1, 0, 1]), np.ones(K)]
    synced, _ = sync_arrays(lsgd.delay(lsgd.average()), x, weights, start)
    snapshots = np.where(weights[0][:, None] > 0, x[0], start)
    np.testing.assert_allclose(synced[1][0], snapshots.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("rule", [lsgd.overlap, lsgd.delay])
def test_function_instead_of_rule_raises(rule):
    with pytest.raises(TypeError, match=rf"{rule.__name__}\(rule\): a SyncRule"):
        rule(lsgd.average)
