"""Lemmas 3.1 to 3.4: numbers, single steps, tightness, and Theorem 2.2 from them."""

import math

import numpy as np
import pytest
from harness.theory_problems import ONES, UNEVEN

from localsgd_jax import theory
from localsgd_jax.theory import RunParameters


def test_lemmas_match_hand_computation():
    step = theory.descent(8.0, 1.0, 16.0, 4.0, 0.125, mu=1.0, smoothness=2.0)
    assert step == (1 - 1 / 8) * 8 + 16 / 64 - 1 / 16 + 2 / 8 * 2 * 4 == 9.1875
    assert theory.descent(8.0, 0.0, 0.0, 0.0, 0.25, mu=0.5, smoothness=1.0) == 7.0
    assert theory.mean_variance(6.0, workers=3) == 2.0
    assert theory.mean_variance(6.0, workers=3, batch=4) == 0.5
    assert theory.drift(0.25, second_moment=25.0, period=4) == 100.0


@pytest.mark.parametrize("seed", range(20))
def test_descent_holds_for_one_step_on_a_quadratic(seed):
    rng = np.random.default_rng(seed)
    scales = np.array([0.5, 1.0, 4.0])  # f(x) = ½Σdⱼxⱼ², x* = 0
    workers = rng.normal(size=(5, 3)) * rng.uniform(0, 2) + rng.normal(size=3)
    mean = workers.mean(0)
    eta, variance = rng.uniform(0, 1 / 16), rng.uniform(0, 2)
    after = np.sum((mean - eta * scales * mean) ** 2) + eta**2 * variance
    drift = np.mean(np.sum((workers - mean) ** 2, axis=1))
    distance, gap = np.sum(mean**2), np.sum(scales * mean**2) / 2
    assert after <= theory.descent(distance, gap, variance, drift, eta, 0.5, 4.0)


def test_drift_bound_holds_and_half_of_it_does_not():
    # f(x) = −G|x| from 0: the sign of the first sample is the direction of all steps.
    # η halves at t, the largest decrease that ηₜ ≤ 2ηₜ₊ₕ allows.
    period, second_moment, eta = 8, 9.0, 0.1
    reach = (period - 1) * 2 * eta * math.sqrt(second_moment)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T
    deviations = reach * (signs - signs.mean(1, keepdims=True))
    limit = theory.drift(eta, second_moment, period)
    assert limit / 2 < np.mean(deviations**2) <= limit


@pytest.mark.parametrize(("a", "steps"), [(17, 40), (33.5, 500), (10_000, 40)])
@pytest.mark.parametrize(
    ("first", "noise", "drift", "tightness"),
    [
        (1.0, 0.0, 0.0, lambda a, steps: 1 - 4 / a),
        (0.0, 1.0, 0.0, lambda a, steps: (steps - 1 + 2 * a) / (steps + 2 * a)),
        (0.0, 0.0, 1.0, lambda a, steps: 1.0),
    ],
)
def test_telescope_is_attained(first, noise, drift, tightness, a, steps):
    # The recursion with equality and the largest eₜ, for which rₜ₊₁ = 0.
    mu, scale = 0.7, 0.3
    eta, r, total = theory.stepsize(mu, a), first, 0.0
    for t in range(steps):
        spent = (1 - mu * eta(t)) * r + eta(t) ** 2 * noise + eta(t) ** 3 * drift
        total += (a + t) ** 2 * spent / (eta(t) * scale)
        r = 0.0
    left = scale * total / theory.weight_sum(steps, a)
    right = sum(theory.telescope(first, noise, drift, mu=mu, steps=steps, a=a))
    assert left / right == pytest.approx(tightness(a, steps), rel=1e-10)


def test_lemmas_3_1_to_3_3_give_the_recursion_of_lemma_3_4():
    mu, smoothness, variance, second_moment = UNEVEN
    run, a, r, gap = (
        RunParameters(workers=3, period=5, steps=40, batch=2),
        100,
        2.0,
        0.3,
    )
    eta = theory.stepsize(mu, a)(4)
    noise = theory.mean_variance(variance, run.workers, run.batch)
    drift = theory.drift(eta, second_moment, run.period)
    curve = 8 * second_moment * run.period**2 * smoothness
    expected = (1 - mu * eta) * r - eta * gap / 2 + eta**2 * noise + eta**3 * curve
    unrolled = theory.descent(r, gap, noise, drift, eta, mu, smoothness)
    assert unrolled == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("constants", [ONES, UNEVEN])
@pytest.mark.parametrize(
    "run",
    [
        RunParameters(1, 1, 1),
        RunParameters(3, 5, 40, batch=2),
        RunParameters(8, 40, 40),
    ],
)
def test_lemmas_give_theorem_2_2(constants, run):
    mu, smoothness, variance, second_moment = constants
    noise = theory.mean_variance(variance, run.workers, run.batch)
    curve = 8 * second_moment * run.period**2 * smoothness
    unrolled = theory.telescope(2.0, noise, curve, mu=mu, steps=run.steps, a=100)
    expected = [2 * term for term in unrolled]  # A = ½
    assert theory.bound(constants, run, 2.0, a=100) == pytest.approx(expected)
