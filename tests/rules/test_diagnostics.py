"""Diagnostics of a synchronisation against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import drifting_cluster
from harness.rule_arrays import (
    K,
    N,
    on_two_devices,
    random_rounds,
    set_params_algorithm,
    sync_arrays,
    weighted_mean,
    weights_of_round,
    with_and_without_weights,
)
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.core.metrics import rule_metrics


def reference_diagnostics(anchor, x, w, momentum):
    """Returns the columns of `with_diagnostics` in float64."""
    p, delta = w / w.sum(), anchor - x
    mean = weighted_mean(delta, w)
    active = np.flatnonzero(w)
    cosines = [
        delta[j] @ delta[k] / np.linalg.norm(delta[j]) / np.linalg.norm(delta[k])
        for j in active
        for k in active
        if j != k
    ]
    distances = ((x - weighted_mean(x, w)) ** 2).sum(1)
    columns = {
        "consensus_distance": np.sqrt(p @ distances),
        "delta_norm": np.linalg.norm(mean),
        "delta_norm.tree": np.linalg.norm(mean),
        "cosine": np.mean(cosines),
        "effective_workers": w.sum() ** 2 / (w**2).sum(),
    }
    if momentum is not None:
        norms = np.linalg.norm(momentum) * np.linalg.norm(mean)
        columns["momentum_cosine"] = mean @ momentum / norms if norms else 0.0
    return columns


@with_and_without_weights
@pytest.mark.parametrize(
    "placement",
    [in_full(None, id="simulate"), pytest.param(on_two_devices, id="lanes")],
)
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_diagnostics_match_reference(weights, placement, momentum):
    rule = lsgd.with_diagnostics(lsgd.outer(optax.sgd(0.5, momentum)))
    anchor, trace = np.zeros(N), None if momentum is None else np.zeros(N)
    x = random_rounds()
    synced, state = sync_arrays(rule, x, weights, placement=placement)
    for i in range(len(x)):
        w = weights_of_round(weights, i)
        expected = reference_diagnostics(anchor, x[i], w, trace)
        delta = anchor - weighted_mean(x[i], w)
        step = delta if trace is None else delta + momentum * trace
        trace = None if trace is None else step
        anchor = anchor - 0.5 * step
    metrics = rule_metrics(state)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, 1e-4, 1e-5, err_msg=name)
    np.testing.assert_allclose(synced[-1][0], anchor, atol=1e-5)


def test_delta_norm_of_each_top_level_key():
    tree = {"a": jnp.zeros(2), "b": [jnp.zeros(1), jnp.zeros(3)]}
    rule = lsgd.with_diagnostics(lsgd.average())
    cluster = lsgd.simulate(set_params_algorithm(rule), 2)
    x = {"a": np.full((2, 2), 3.0), "b": [np.full((2, 1), 4.0), np.zeros((2, 3))]}
    state, _ = cluster.step(cluster.init({"params": tree}), jax.tree.map(np.float32, x))
    metrics = rule_metrics(cluster.sync(state))
    assert float(metrics["delta_norm.b"]) == 4
    np.testing.assert_allclose(metrics["delta_norm.a"], np.sqrt(18), rtol=1e-6)
    np.testing.assert_allclose(metrics["delta_norm"], np.sqrt(34), rtol=1e-6)
    assert float(metrics["consensus_distance"]) == 0
    np.testing.assert_allclose(metrics["cosine"], 1, rtol=1e-6)


def test_zero_weight_workers_may_be_nan():
    x = random_rounds(1)
    x[0, 2] = np.nan
    rule = lsgd.with_diagnostics(lsgd.average())
    _, state = sync_arrays(rule, x, [np.array([1.0, 1, 0, 1])])
    assert all(np.isfinite(number) for number in rule_metrics(state).values())
    _, state = sync_arrays(rule, x, [np.zeros(K)])
    assert all(number == 0 for number in rule_metrics(state).values())


@pytest.mark.parametrize("schedule", [lsgd.every(3), lsgd.at_steps([2, 5, 9])])
def test_history_has_the_diagnostics_of_each_round(schedule):
    cluster, state, batches = drifting_cluster(lsgd.with_diagnostics(lsgd.average()))
    state, history = lsgd.train(
        cluster, state, batches, schedule=schedule, steps=12, progress=False
    )
    lengths = np.diff([0, *history["step"]])
    expected = lengths * np.sqrt(3 / 4)  # From the mean of four orthogonal updates.
    np.testing.assert_allclose(history["consensus_distance"], expected, rtol=1e-5)
    np.testing.assert_allclose(history["effective_workers"], 4)
    np.testing.assert_allclose(history["cosine"], 0, atol=1e-6)


def test_function_instead_of_rule_raises():
    with pytest.raises(TypeError, match=r"with_diagnostics\(rule\): a SyncRule"):
        lsgd.with_diagnostics(lsgd.average)
