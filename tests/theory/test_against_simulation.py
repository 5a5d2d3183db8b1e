"""Bounds against simulations of Algorithms 1 and 2 on problems of known constants."""

import numpy as np
import pytest
from harness.selection import in_full
from harness.theory_problems import PROBLEMS

from localsgd_jax import theory
from localsgd_jax.theory import RunParameters

SEEDS = 200


def sample_signs(workers, steps):
    """Yields the random signs ξ of each step, shape (seeds, K, 2)."""
    rng = np.random.default_rng(workers * 10_007 + steps)
    for _ in range(steps):
        yield 2.0 * rng.integers(0, 2, size=(SEEDS, workers, 2)) - 1


def local_sgd(problem, workers, period, steps, a):
    """Runs Algorithm 1; returns the error of the weighted average, mean over seeds."""
    x = np.tile(problem.x0, (SEEDS, workers, 1))
    total = np.zeros((SEEDS, 2))
    for t, samples in enumerate(sample_signs(workers, steps)):
        total += (a + t) ** 2 * x.mean(1)
        x = x - 4 / (problem.constants.mu * (a + t)) * problem.gradient(x, samples)
        if (t + 1) % period == 0:
            x = np.broadcast_to(x.mean(1, keepdims=True), x.shape)
    return problem.error(total / sum((a + t) ** 2 for t in range(steps)))


def asynchronous_sgd(problem, workers, period, steps, a, delay):
    """Runs Algorithm 2 with staggered synchronisation and delayed writes.

    Returns the error of the weighted average, mean over seeds.
    """
    x = np.tile(problem.x0, (SEEDS, workers, 1))
    last_read, shared, total = x.copy(), x[:, 0].copy(), np.zeros((SEEDS, 2))
    pending = []
    for t, samples in enumerate(sample_signs(workers, steps)):
        total += (a + t) ** 2 * x.mean(1)
        x = x - 4 / (problem.constants.mu * (a + t)) * problem.gradient(x, samples)
        due = [k for k in range(workers) if (t + 1 + k) % period == 0]
        pending += [(t + delay, x[:, k] - last_read[:, k]) for k in due]
        arrived = [update for due_at, update in pending if due_at == t]
        shared = shared + sum(arrived) / workers
        pending = [(due_at, update) for due_at, update in pending if due_at > t]
        x[:, due] = last_read[:, due] = shared[:, None]
    return problem.error(total / sum((a + t) ** 2 for t in range(steps)))


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("workers", [in_full(1), 4, in_full(16)])
@pytest.mark.parametrize(
    ("period", "steps"),
    [(1, 1), (1, 60), (7, 60), (60, 60), (1, 600), (25, 600), (600, 600)],
)
def test_error_is_below_the_bound(name, workers, period, steps):
    problem, run = PROBLEMS[name], RunParameters(workers, period, steps)
    a = theory.shift(problem.constants.mu, problem.constants.smoothness, period)
    limit = sum(theory.bound(problem.constants, run, problem.distance, a))
    assert 0 < local_sgd(problem, workers, period, steps, a) <= limit


@pytest.mark.parametrize(
    ("name", "workers", "steps"),
    [("isotropic", 1, 600), ("isotropic", 4, 600), ("isotropic", 64, 600)]
    + [("noiseless", 1, 1), ("noiseless", 4, 60), ("piecewise", 16, 60)],
)
def test_error_without_drift_is_below_the_other_terms(name, workers, steps):
    problem = PROBLEMS[name]
    a = theory.shift(problem.constants.mu, problem.constants.smoothness, period=1)
    run = RunParameters(workers, 1, steps)
    terms = theory.bound(problem.constants, run, problem.distance, a)
    error = local_sgd(problem, workers, 1, steps, a)
    assert error <= terms.initial + terms.noise <= 30 * error


def test_error_with_drift_exceeds_the_other_terms():
    # f is not quadratic, x₀ = x*, and the noise of a thousand workers is small.
    problem = PROBLEMS["piecewise"]._replace(x0=np.zeros(2))
    run = RunParameters(workers=1000, period=100, steps=100)
    terms = theory.bound(problem.constants, run, problem.distance, a=101)
    error = local_sgd(problem, 1000, 100, 100, a=101)
    assert 2 * (terms.initial + terms.noise) < error <= sum(terms)


@pytest.mark.parametrize("name", ["isotropic", "distant", "piecewise"])
@pytest.mark.parametrize(("period", "delay"), [(1, 0), (1, 5), (8, 0), (8, 12)])
def test_asynchronous_error_is_below_the_bound(name, period, delay):
    problem, run = PROBLEMS[name], RunParameters(workers=4, period=period, steps=200)
    mu, smoothness, *_ = problem.constants
    a = theory.shift(mu, smoothness, period, delay)
    terms = theory.asynchronous_bound(
        problem.constants, run, problem.distance, a, delay, coefficient=576
    )
    assert 0 < asynchronous_sgd(problem, 4, period, 200, a, delay) <= sum(terms)


def test_asynchronous_sgd_without_delay_is_synchronous():
    error = asynchronous_sgd(PROBLEMS["piecewise"], 4, 1, 50, 65, delay=0)
    assert error == pytest.approx(local_sgd(PROBLEMS["piecewise"], 4, 1, 50, 65))
