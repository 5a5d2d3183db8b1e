"""Problem constants: exact, estimated, and of the datasets w8a and a9a."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.data_files import data_file
from harness.selection import keep
from harness.theory_problems import PROBLEMS

from localsgd_jax import theory


def test_estimate_is_exact_on_a_quadratic():
    constants, slopes, noise, x0 = PROBLEMS["isotropic"]
    corners = jnp.array([[s, t] for s in (-1.0, 1.0) for t in (-1.0, 1.0)])

    def loss(params, signs):
        x = jnp.stack([params["first"], params["second"]])
        return jnp.sum(slopes[0] * x**2 / 2 - noise * signs * x)

    path = [{"first": c * x0[0], "second": c * x0[1]} for c in (0.1, 1.0, 0.5)]
    curvature = theory.quadratic_curvature(np.diag(slopes[0]))
    estimate = theory.estimate(loss, corners, path, *curvature)
    assert all(type(value) is float for value in estimate)
    # σ² = 1 + 1, G² = σ² + 0.1² + 0.05²: the largest on the path.
    assert estimate == pytest.approx((1.0, 1.0, 2.0, 2.0125), rel=1e-6)
    assert estimate.second_moment <= constants.second_moment


def test_quadratic_curvature_of_a_full_matrix():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    hessian = basis @ np.diag([7.0, 0.25, 1.0, 2.0, 3.0]) @ basis.T
    assert theory.quadratic_curvature(hessian) == pytest.approx((0.25, 7.0))


@pytest.mark.parametrize(("distance", "attained"), [(0, 1), (1, None), (1e4, 0)])
def test_logistic_curvature_bounds_the_hessian(distance, attained):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 4)) * [3.0, 1.0, 1.0, 0.1]
    curvature = theory.logistic_curvature(features, 0.1)
    slope = 1 / (1 + np.exp(np.minimum(features @ np.full(4, distance), 500)))
    hessian = features.T * (slope * (1 - slope)) @ features / 30 + 0.1 * np.eye(4)
    eigenvalues = np.linalg.eigvalsh(hessian)[[0, -1]]
    slack = 1e-12
    assert (
        curvature[0] - slack <= eigenvalues[0] <= eigenvalues[1] <= curvature[1] + slack
    )
    if attained is not None:  # L at 0, μ far from 0.
        assert eigenvalues[-attained] == pytest.approx(curvature[attained], rel=1e-9)


def quadratic_with(eigenvalues):
    """Returns a quadratic of a pytree with the given Hessian eigenvalues."""
    count = len(eigenvalues)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(count, count)))[0]
    hessian = basis @ np.diag(eigenvalues) @ basis.T

    def loss(params, example):
        x = jnp.concatenate([params["first"], params["second"].ravel()])
        return x @ jnp.asarray(hessian, jnp.float32) @ x / 2 - jnp.dot(example, x)

    start = {"first": jnp.ones(count - 4), "second": jnp.ones((2, 2))}
    return loss, jnp.ones((3, count)), start, hessian


def test_curvature_of_a_quadratic():
    loss, examples, start, hessian = quadratic_with(np.geomspace(0.01, 7.0, 12))
    curvature = theory.curvature(loss, examples, [start])
    assert all(type(value) is float for value in curvature)
    assert curvature == pytest.approx(theory.quadratic_curvature(hessian), rel=5e-3)


def test_curvature_of_logistic_regression():
    """L is attained at 0 and μ far from it: each point of the path gives one."""
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(30, 4)) * [3.0, 1.0, 1.0, 0.1]).astype(np.float32)

    def loss(x, features):
        return jax.nn.softplus(-jnp.dot(features, x)) + 0.1 * jnp.sum(x**2) / 2

    path = [np.zeros(4, np.float32), np.full(4, 1e4, np.float32)]
    expected = theory.logistic_curvature(features, 0.1)
    assert theory.curvature(loss, features, path) == pytest.approx(expected, rel=1e-3)
    assert theory.curvature(loss, features, path[::-1]) == pytest.approx(
        expected, rel=1e-3
    )


@pytest.mark.full
@pytest.mark.parametrize("iterations", [5, 10, 20, 512])
def test_unconverged_curvature_is_conservative(iterations):
    """Before convergence the interval contains all eigenvalues."""
    eigenvalues = np.geomspace(0.001, 1.0, 60)
    loss, examples, start, _ = quadratic_with(eigenvalues)
    mu, smoothness = theory.curvature(loss, examples, [start], iterations)
    assert mu <= eigenvalues[0] and smoothness >= eigenvalues[-1]
    if iterations == 512:
        assert (mu, smoothness) == pytest.approx((0.001, 1.0), rel=0.02)


def test_curvature_without_strong_convexity():
    loss, examples, start, _ = quadratic_with(np.linspace(-2.0, 5.0, 9))
    assert theory.curvature(loss, examples, [start]) == pytest.approx(
        (-2.0, 5.0), rel=1e-3
    )
    # A function that is flat up to rounding is not strongly convex either.
    features = np.random.default_rng(0).normal(size=(5, 20)).astype(np.float32)
    flat, _ = theory.curvature(
        lambda x, a: jax.nn.softplus(jnp.dot(a, x)), features, [np.zeros(20)]
    )
    assert -1e-4 < flat <= 0


def test_curvature_of_bfloat16_params_is_computed_in_float32():
    loss, examples, start, hessian = quadratic_with(np.geomspace(0.01, 7.0, 12))
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), start)
    assert theory.curvature(loss, examples, [halves]) == pytest.approx(
        theory.quadratic_curvature(hessian), rel=5e-3
    )


DATA = {
    "w8a": dict(
        features=300,
        mu=2.01009e-5,
        smoothness=0.6612195,
        start=(2.59610, 2.91255),
        optimal_variance=0.111868,
        optimum=0.126180686510513,
        norm=27.6896,
        kappa=32_895.0,
    ),
    "a9a": dict(
        features=123,
        mu=3.07116e-5,
        smoothness=1.571950,
        start=(3.01331, 3.46728),
        optimal_variance=1.44163,
        optimum=0.32337958246485,
        norm=6.222226,
        kappa=51_184.3,
    ),
}


def newton(features, labels, penalty):
    """Returns minimiser and minimum of regularised logistic regression."""
    x = np.zeros(features.shape[1])
    for _ in range(10):
        margins = labels * (features @ x)
        slope = 1 / (1 + np.exp(margins))
        gradient = -(features.T @ (labels * slope)) / len(labels) + penalty * x
        weighted = features.multiply((slope * (1 - slope))[:, None]).tocsr()
        hessian = (features.T @ weighted).toarray() / len(labels)
        x = x - np.linalg.solve(hessian + penalty * np.eye(len(x)), gradient)
    value = np.mean(np.logaddexp(0, -labels * (features @ x))) + penalty * x @ x / 2
    return x, value


@pytest.mark.full
@pytest.mark.parametrize("name", keep(DATA, ["a9a"]))
def test_constants_of_w8a_and_a9a(name):
    path = str(data_file(name))
    datasets = pytest.importorskip("sklearn.datasets")
    expected = DATA[name]
    sparse, labels = datasets.load_svmlight_file(path, n_features=expected["features"])
    penalty = 1 / len(labels)
    optimum, value = newton(sparse, labels, penalty)
    features = sparse.toarray()

    def loss(x, example):
        margin = example[1] * jnp.dot(example[0], x)
        return jax.nn.softplus(-margin) + penalty * jnp.sum(x**2) / 2

    curvature = theory.logistic_curvature(features, penalty)
    examples = (features.astype(np.float32), labels.astype(np.float32))
    x0 = np.zeros_like(optimum)
    first = theory.estimate(loss, examples, [x0], *curvature)
    last = theory.estimate(loss, examples, [optimum], *curvature)
    assert curvature == pytest.approx(
        (expected["mu"], expected["smoothness"]), rel=3e-6
    )
    assert first.smoothness / first.mu == pytest.approx(expected["kappa"], rel=3e-6)
    assert first[2:] == pytest.approx(expected["start"], rel=3e-6)
    assert last.variance == pytest.approx(expected["optimal_variance"], rel=5e-6)
    assert value == pytest.approx(expected["optimum"], rel=1e-12)
    assert np.linalg.norm(optimum) == pytest.approx(expected["norm"], rel=3e-6)
