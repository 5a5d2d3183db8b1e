"""Robust aggregation and outlier removal against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.rule_arrays import (
    WEIGHTS,
    K,
    N,
    random_rounds,
    sync_arrays,
    weights_of_round,
    with_and_without_weights,
)
from harness.selection import in_full

import localsgd_jax as lsgd


@with_and_without_weights
def test_median(weights):
    synced, _ = sync_arrays(lsgd.median(), random_rounds(), weights)
    for i, x in enumerate(random_rounds()):
        expected = np.median(x[weights_of_round(weights, i) > 0], axis=0)
        np.testing.assert_allclose(synced[i], np.tile(expected, (K, 1)), atol=1e-6)


@pytest.mark.parametrize("workers, fraction", [(4, 0.25), (5, 0.4), (3, 0.0), (5, 0.1)])
def test_trimmed_mean(workers, fraction):
    x = random_rounds(2, workers)
    synced, _ = sync_arrays(lsgd.trimmed_mean(fraction), x)
    drop = int(fraction * workers + 1e-9)
    kept = np.sort(x, axis=1)[:, drop : workers - drop]
    np.testing.assert_allclose(synced[:, 0], kept.mean(axis=1), atol=1e-6)


def test_trimmed_mean_counts_active_workers():
    """Of 8 workers 4 are active: a quarter is one worker at each end, not two."""
    x = random_rounds(1, 8)
    weights = np.array([1.0, 0, 2, 0, 1, 0, 0, 1])
    synced, _ = sync_arrays(lsgd.trimmed_mean(0.25), x, [weights])
    kept = np.sort(x[0, weights > 0], axis=0)[1:3]
    np.testing.assert_allclose(synced[0][0], kept.mean(axis=0), atol=1e-6)


def test_two_outliers_of_five_do_not_move_median_and_trimmed_mean():
    x = random_rounds(1, 5)
    x[0, 3:] = [[1e9], [-1e9]] * np.ones((2, N))
    for rule in (lsgd.median(), lsgd.trimmed_mean(0.2)):
        synced, _ = sync_arrays(rule, x)
        inliers = x[0, :3]
        assert (inliers.min(0) - 1e-6 <= synced[0][0]).all()
        assert (synced[0][0] <= inliers.max(0) + 1e-6).all()


def dropped_workers(state):
    return int(state.shared["params"].metrics.scalars["dropped_workers"])


@pytest.mark.parametrize("value", [np.nan, np.inf, in_full(3e38)])
@pytest.mark.parametrize("rule", [lsgd.average(), lsgd.outer(optax.sgd(1.0))])
def test_non_finite_workers_are_dropped(value, rule):
    x = random_rounds(2)
    x[1, 2, 5:8] = value
    synced, state = sync_arrays(lsgd.drop_outliers(rule), x)
    np.testing.assert_allclose(synced[0][0], x[0].mean(0), atol=1e-6)
    expected = np.delete(x[1], 2, axis=0).mean(0)
    np.testing.assert_allclose(synced[1], np.tile(expected, (K, 1)), atol=1e-6)
    assert dropped_workers(state) == 1


def test_outliers_are_dropped():
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.normal(size=(12, 1, N)), axis=0)
    x = path + 0.1 * rng.normal(size=(12, K, N))
    x[9, 1] += 1000
    rule = lsgd.drop_outliers(lsgd.average(), threshold=6, warm_up=4)
    synced, state = sync_arrays(rule, x)
    for i in range(12):
        inliers = [0, 2, 3] if i == 9 else [0, 1, 2, 3]
        np.testing.assert_allclose(synced[i][0], x[i, inliers].mean(0), atol=1e-4)
    assert dropped_workers(state) == 1
    tolerant = lsgd.drop_outliers(lsgd.average(), threshold=1e4, warm_up=4)
    synced, state = sync_arrays(tolerant, x)
    np.testing.assert_allclose(synced[9][0], x[9].mean(0), rtol=1e-4)
    assert dropped_workers(state) == 0


@pytest.mark.parametrize("outlier, dropped", [(1, 0), (2, 1)])
def test_warm_up_ends_after_its_rounds(outlier, dropped):
    """The first `warm_up` rounds drop finite workers never, the next does."""
    x = np.cumsum(1 + 0.1 * random_rounds(outlier + 1), axis=0)
    x[outlier, 1] += 1000
    rule = lsgd.drop_outliers(lsgd.average(), threshold=6, warm_up=2)
    _, state = sync_arrays(rule, x)
    assert dropped_workers(state) == dropped


def test_running_moments_of_outlier_removal():
    x, decay = random_rounds(3), 0.75
    _, state = sync_arrays(lsgd.drop_outliers(lsgd.average(), decay=decay), x)
    anchor, mean, variance = np.zeros(N), None, None
    for values in x:
        log_norms = np.log(np.linalg.norm(anchor - values, axis=1))
        first, anchor = mean is None, values.mean(axis=0)
        old = log_norms.mean() if first else mean
        mean = decay * old + (1 - decay) * log_norms.mean()
        deviation = ((log_norms - mean) ** 2).mean()
        variance = deviation if first else decay * variance + (1 - decay) * deviation
    moments = state.shared["params"]
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(moments.variance, variance, rtol=1e-4)


def test_all_outliers_restore_anchor():
    x = random_rounds(3)
    x[1] = np.nan
    synced, state = sync_arrays(lsgd.drop_outliers(lsgd.diloco()), x)
    np.testing.assert_array_equal(synced[1], synced[0])
    assert np.isfinite(synced[2]).all()
    assert dropped_workers(state) == K


def test_workers_of_weight_zero_are_not_counted_as_dropped():
    rule = lsgd.drop_outliers(lsgd.average())
    _, state = sync_arrays(rule, random_rounds(), WEIGHTS)
    assert dropped_workers(state) == 0


def test_history_counts_dropped_workers():
    rule = lsgd.drop_outliers(lsgd.average())
    made = lsgd.from_train_step(lambda s, b: ({"params": b}, {}), rule)
    cluster = lsgd.simulate(made, 3)
    good = np.arange(6, dtype=np.float32).reshape(3, 2)
    bad = np.where([[0], [1], [0]], np.nan, good).astype(np.float32)
    _, history = lsgd.train(
        cluster,
        cluster.init({"params": jnp.zeros(2)}),
        [good, bad, good, bad],
        schedule=1,
        progress=False,
    )
    np.testing.assert_array_equal(history["dropped_workers"], [0, 1, 1, 2])


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: lsgd.trimmed_mean(0.5),
            r"trimmed_mean\(fraction\): fraction must be in \[0, 0.5\), got 0.5",
        ),
        (
            lambda: lsgd.drop_outliers(lsgd.average(), threshold=0),
            r"drop_outliers\(threshold\): threshold must be positive, got 0",
        ),
        (
            lambda: lsgd.drop_outliers(lsgd.average(), decay=1),
            r"drop_outliers\(decay\): decay must be in \[0, 1\), got 1",
        ),
        (
            lambda: lsgd.drop_outliers(lsgd.average(), warm_up=-1),
            r"drop_outliers\(warm_up\): warm_up must be at least 0, got -1",
        ),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
