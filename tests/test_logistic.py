"""The logistic problem: f, its gradient, f* and the curvature, against oracles."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from scipy.sparse import csr_matrix, random

from localsgd_jax.experiments import datasets, logistic


def problem(examples=40, dimension=5, density=0.7, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    features = random(examples, dimension, density, "csr", rng=rng) * scale
    labels = np.where(rng.normal(size=examples) > 0, 1.0, -1.0)
    return datasets.Dataset("random", csr_matrix(features), labels)


def test_f_at_zero_is_log_two():
    assert logistic.value(problem(), np.zeros(5)) == pytest.approx(np.log(2), abs=1e-15)


def test_f_by_hand():
    dataset = datasets.Dataset("two", csr_matrix([[2.0], [0.0]]), np.array([1.0, -1.0]))
    by_hand = (np.log1p(np.exp(-2 * 3.0)) + np.log(2)) / 2 + 0.5 / 2 * 3.0**2
    assert logistic.value(dataset, np.array([3.0])) == pytest.approx(by_hand, rel=1e-15)


def test_huge_parameters_do_not_overflow():
    x = np.full(5, 1e4)
    assert np.isfinite(logistic.value(problem(), x))
    assert np.all(np.isfinite(logistic.gradient(problem(), x)))


def test_the_loss_of_all_examples_is_f():
    dataset = problem()
    x = np.random.default_rng(1).normal(size=5)
    batch = jnp.asarray(dataset.features.toarray()), jnp.asarray(dataset.labels)
    loss = logistic.loss_fn(dataset)
    np.testing.assert_allclose(
        loss(jnp.asarray(x), batch), logistic.value(dataset, x), rtol=1e-5
    )
    np.testing.assert_allclose(
        jax.grad(loss)(jnp.asarray(x), batch),
        logistic.gradient(dataset, x),
        rtol=1e-4,
        atol=1e-6,
    )


def test_the_penalty_is_one_over_n():
    assert logistic.penalty(problem(examples=40)) == 1 / 40


@pytest.mark.parametrize(
    "dataset",
    [problem(), problem(30, 5000, 0.01), problem(200, 1), problem(scale=50.0)],
    ids=["small", "many features", "one feature", "large values"],
)
def test_the_minimum_is_that_of_another_solver(dataset):
    found = scipy.optimize.minimize(
        lambda x: logistic.value(dataset, x),
        np.zeros(dataset.dimension),
        jac=lambda x: logistic.gradient(dataset, x),
        method="BFGS" if dataset.dimension < 100 else "L-BFGS-B",
        options={"gtol": 1e-9},
    )
    minimum = logistic.minimum(dataset)
    assert minimum == pytest.approx(found.fun, rel=1e-9)
    assert minimum <= found.fun + 1e-15


@pytest.mark.parametrize(
    "name, minimum", [("w8a", 0.126180686510513), ("a9a", 0.32337958246485)]
)
def test_the_minimum_of_real_data(name, minimum):
    if "LOCALSGD_DATA" not in os.environ:
        pytest.skip("LOCALSGD_DATA is not set")
    assert logistic.minimum(datasets.load(name)) == pytest.approx(minimum, abs=1e-14)


def test_a_minimum_that_is_not_certain_is_refused(monkeypatch):
    monkeypatch.setattr(logistic, "_CERTAIN", 0.0)
    with pytest.raises(ValueError, match="random: f\\* is known to .* rescale"):
        logistic.minimum(problem())


def test_features_far_out_of_scale_are_refused():
    dataset = problem(scale=1e12)
    with pytest.raises(ValueError, match="rescale the features"):
        logistic.minimum(dataset)


@pytest.mark.parametrize("examples, dimension", [(40, 5), (5, 40), (40, 1), (2, 2)])
def test_the_curvature_of_a_batch(examples, dimension):
    dataset = problem(examples, dimension, density=0.9)
    dense = dataset.features.toarray()
    top = np.linalg.eigvalsh(dense.T @ dense)[-1] / (4 * examples)
    mean = np.mean(np.sum(dense**2, axis=1)) / 4
    for batch, expected in ((1, mean), (4, 0.75 * top + 0.25 * mean), (10**12, top)):
        assert logistic.batch_curvature(dataset, batch) == pytest.approx(
            expected + 1 / examples, rel=1e-9
        )


def test_the_curvature_bounds_that_of_f():
    dataset = problem()
    batch = dataset.features.toarray(), dataset.labels
    hessian = jax.hessian(logistic.loss_fn(dataset))(jnp.zeros(5), batch)
    top = np.linalg.eigvalsh(hessian)[-1]
    assert top == pytest.approx(logistic.batch_curvature(dataset, 10**9), rel=1e-5)
