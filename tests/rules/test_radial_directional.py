"""Radial-directional averaging against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
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

RDA = lsgd.radial_directional_average


@with_and_without_weights
def test_radial_directional_average(weights):
    synced, _ = sync_arrays(RDA(), random_rounds(), weights)
    for i, x in enumerate(random_rounds()):
        w, norms = weights_of_round(weights, i), np.linalg.norm(x, axis=1)
        direction = weighted_mean(x / norms[:, None], w)
        expected = weighted_mean(norms, w) * direction / np.linalg.norm(direction)
        np.testing.assert_allclose(synced[i], np.tile(expected, (K, 1)), atol=1e-5)


def sync_vectors(rule, values, tree):
    cluster = lsgd.simulate(set_params_algorithm(rule), 2)
    state, _ = cluster.step(cluster.init({"params": tree}), values)
    return cluster.sync(state).workers["params"]


def test_matches_hand_computation_per_leaf():
    """(3, 0) and (0, 4) give (2.475, 2.475); another leaf has its own norm."""
    values = {
        "a": jnp.array([[3.0, 0], [0, 4]]),
        "b": jnp.array([[0.0, 1], [0, 3]]),
        "zero": jnp.zeros((2, 2)),
    }
    tree = {name: jnp.zeros(2) for name in values}
    result = sync_vectors(RDA(), values, tree)
    np.testing.assert_allclose(result["a"], [[2.4748737] * 2] * 2, rtol=1e-6)
    np.testing.assert_allclose(result["b"], [[0, 2]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(result["zero"], 0)


def test_opposite_updates_cancel():
    values = {"w": jnp.array([[1.0, 0], [-1, 0]])}
    result = sync_vectors(RDA(), values, {"w": jnp.zeros(2)})
    np.testing.assert_array_equal(result["w"], 0)


def test_equal_workers_are_unchanged():
    x = np.tile(random_rounds(2, workers=1), (1, K, 1))
    synced, _ = sync_arrays(RDA(), x)
    np.testing.assert_allclose(synced, x, rtol=1e-5)


def test_embeddings_by_the_plain_mean():
    rule = lsgd.partition(
        {"plain": lsgd.average(), "rda": RDA()},
        lambda path: "plain" if path == "embed" else "rda",
    )
    values = {name: jnp.array([[3.0, 0], [0, 4]]) for name in ("embed", "w")}
    result = sync_vectors(rule, values, {"embed": jnp.zeros(2), "w": jnp.zeros(2)})
    np.testing.assert_allclose(result["embed"][0], [1.5, 2])
    np.testing.assert_allclose(result["w"][0], [2.4748737] * 2, rtol=1e-6)


def test_directions_may_be_compressed():
    synced, _ = sync_arrays(RDA(lsgd.quantize(lsgd.average(), 8)), random_rounds(1))
    exact, _ = sync_arrays(RDA(), random_rounds(1))
    assert 0 < np.abs(synced - exact).max() < 0.05
    assert synced.shape == (1, K, N)


def test_invalid_arguments_raise():
    with pytest.raises(TypeError, match=r"radial_directional_average\(rule\)"):
        RDA(1)
    with pytest.raises(TypeError, match="floating point"):
        sync_tree(RDA(), {"n": jnp.zeros(3, int)})
