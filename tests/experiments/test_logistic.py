"""Logistic regression: f, its gradient, f* and the curvature, against references."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from harness.experiment_files import DIGITS, require_dataset
from harness.selection import in_full
from scipy.sparse import csr_matrix, random

from localsgd_jax.experiments import datasets, logistic


def random_dataset(examples=40, dimension=5, density=0.7, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    features = random(examples, dimension, density, "csr", rng=rng) * scale
    labels = np.where(rng.normal(size=examples) > 0, 1.0, -1.0)
    return datasets.Dataset("random", csr_matrix(features), labels)


def test_objective_at_zero_is_log_two():
    assert logistic.objective(random_dataset(), np.zeros(5)) == pytest.approx(
        np.log(2), abs=1e-15
    )


def test_objective_matches_hand_computation():
    dataset = datasets.Dataset("two", csr_matrix([[2.0], [0.0]]), np.array([1.0, -1.0]))
    expected = (np.log1p(np.exp(-2 * 3.0)) + np.log(2)) / 2 + 0.5 / 2 * 3.0**2
    assert logistic.objective(dataset, np.array([3.0])) == pytest.approx(
        expected, rel=1e-15
    )


def test_huge_parameters_do_not_overflow():
    x = np.full(5, 1e4)
    assert np.isfinite(logistic.objective(random_dataset(), x))
    assert np.all(np.isfinite(logistic.gradient(random_dataset(), x)))


def test_loss_of_all_examples_equals_objective():
    dataset = random_dataset()
    x = np.random.default_rng(1).normal(size=5)
    batch = jnp.asarray(dataset.features.toarray()), jnp.asarray(dataset.labels)
    loss = logistic.loss_fn(dataset)
    np.testing.assert_allclose(
        loss(jnp.asarray(x), batch), logistic.objective(dataset, x), rtol=1e-5
    )
    np.testing.assert_allclose(
        jax.grad(loss)(jnp.asarray(x), batch),
        logistic.gradient(dataset, x),
        rtol=1e-4,
        atol=1e-6,
    )


def test_penalty_is_one_over_n():
    assert logistic.penalty(random_dataset(examples=40)) == 1 / 40


@pytest.mark.parametrize(
    "dataset",
    [
        random_dataset(),
        random_dataset(30, 5000, 0.01),
        random_dataset(200, 1),
        random_dataset(scale=50.0),
    ],
    ids=["small", "many features", "one feature", "large values"],
)
def test_optimal_value_matches_scipy(dataset):
    found = scipy.optimize.minimize(
        lambda x: logistic.objective(dataset, x),
        np.zeros(dataset.dimension),
        jac=lambda x: logistic.gradient(dataset, x),
        method="BFGS" if dataset.dimension < 100 else "L-BFGS-B",
        options={"gtol": 1e-9},
    )
    minimum = logistic.optimal_value(dataset)
    assert minimum == pytest.approx(found.fun, rel=1e-9)
    assert minimum <= found.fun + 1e-15


@pytest.mark.parametrize(
    "name, minimum",
    [in_full("w8a", 0.126180686510513), ("a9a", 0.32337958246485)],
)
def test_optimal_value_of_registered_datasets(name, minimum):
    require_dataset(name)
    assert logistic.optimal_value(datasets.load(name)) == pytest.approx(
        minimum, abs=1e-14
    )


def test_optimality_gap_above_tolerance_raises(monkeypatch):
    monkeypatch.setattr(logistic, "MAX_OPTIMALITY_GAP", 0.0)
    with pytest.raises(
        ValueError, match="^random: the error of f.* must be .* rescale"
    ):
        logistic.optimal_value(random_dataset())


def test_badly_scaled_features_raise():
    dataset = random_dataset(scale=1e12)
    with pytest.raises(ValueError, match="rescale the features"):
        logistic.optimal_value(dataset)


@pytest.mark.parametrize("examples, dimension", [(40, 5), (5, 40), (40, 1), (2, 2)])
def test_batch_curvature_matches_eigenvalues(examples, dimension):
    dataset = random_dataset(examples, dimension, density=0.9)
    dense = dataset.features.toarray()
    top = np.linalg.eigvalsh(dense.T @ dense)[-1] / (4 * examples)
    mean = np.mean(np.sum(dense**2, axis=1)) / 4
    for batch, expected in ((1, mean), (4, 0.75 * top + 0.25 * mean), (10**12, top)):
        assert logistic.batch_curvature(dataset, batch) == pytest.approx(
            expected + 1 / examples, rel=1e-9
        )


@pytest.mark.full
def test_batch_curvature_matches_hessian_at_zero():
    dataset = random_dataset()
    batch = dataset.features.toarray(), dataset.labels
    hessian = jax.hessian(logistic.loss_fn(dataset))(jnp.zeros(5), batch)
    top = np.linalg.eigvalsh(hessian)[-1]
    assert top == pytest.approx(logistic.batch_curvature(dataset, 10**9), rel=1e-5)


def test_suboptimality_weights_duplicate_examples():
    twice = np.r_[np.arange(DIGITS.examples), np.arange(700), 7, 7]
    dataset = DIGITS._replace(
        features=DIGITS.features[twice], labels=DIGITS.labels[twice]
    )
    points = np.random.default_rng(0).normal(size=(131, DIGITS.dimension))
    points = points.astype(np.float32)
    points[0] = 0
    found = logistic.suboptimality_fn(dataset, 0.25)(points)
    expected = [logistic.objective(dataset, x) - 0.25 for x in points]
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_suboptimality_of_non_finite_points_is_infinite():
    points = np.zeros((3, DIGITS.dimension), np.float32)
    points[1], points[2, 5] = np.nan, np.inf
    found = logistic.suboptimality_fn(DIGITS, 0.0)(points)
    np.testing.assert_allclose(found, [math.log(2), np.inf, np.inf], rtol=1e-6)
