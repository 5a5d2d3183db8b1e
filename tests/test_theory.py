"""The theorems against arithmetic, against simulation and against real data."""

import math
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from localsgd_jax import theory
from localsgd_jax.theory import Constants, Run

ONES = Constants(mu=1.0, smoothness=1.0, variance=1.0, second_moment=1.0)
UNEVEN = Constants(mu=0.5, smoothness=3.0, variance=7.0, second_moment=11.0)


# Stepsize, weights, averages.


@pytest.mark.parametrize("count", [0, 1, 999, np.int32(7)])
def test_stepsize_agrees_on_python_and_traced_counts(count):
    schedule = theory.stepsize(mu=0.5, a=97)
    expected = 4 / (0.5 * (97 + count))
    assert schedule(count) == expected
    np.testing.assert_allclose(jax.jit(schedule)(count), expected, rtol=1e-6)


def test_stepsize_is_an_optax_schedule():
    optimizer = optax.sgd(theory.stepsize(mu=2.0, a=10))
    state = optimizer.init(jnp.zeros(()))
    for t in range(3):
        update, state = optimizer.update(jnp.ones(()), state)
        np.testing.assert_allclose(update, -2.0 / (10 + t), rtol=1e-6)


@pytest.mark.parametrize(
    ("mu", "smoothness", "period", "delay", "expected"),
    [(1, 1, 4, 0, 17), (1, 1, 16, 0, 17), (1, 1, 17, 0, 18), (1, 1, 16, 4, 21)]
    + [(0.5, 3.0, 1, 0, 97), (2.0, 2.1, 5, 5, 17)],
)
def test_shift_is_the_smallest_allowed(mu, smoothness, period, delay, expected):
    a = theory.shift(mu, smoothness, period, delay)
    assert a == expected
    assert a > max(16 * smoothness / mu, period + delay) >= a - 1
    eta = theory.stepsize(mu, a)
    assert eta(0) <= 1 / (4 * smoothness)
    assert all(eta(t) <= 2 * eta(t + period + delay) for t in range(100))


@pytest.mark.parametrize("a", [1, 3, 17.5, 526_321])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_weights_are_powers_also_beyond_int32(a, power):
    weight = theory.weights(a, power)
    for t in (0, 1, 50):
        assert weight(t) == (a + t) ** power
        np.testing.assert_allclose(jax.jit(weight)(t), float(a + t) ** power, rtol=1e-6)


@pytest.mark.parametrize(
    ("steps", "a", "expected"), [(7, 3, 280), (100, 50, 1_073_350), (1, 17, 289)]
)
def test_weight_sum_in_numbers(steps, a, expected):
    assert theory.weight_sum(steps, a) == expected


@pytest.mark.parametrize("a", [1, 2, 17, 33.5, 526_321])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_weight_sum_is_the_sum_of_the_weights(steps, a):
    weight = theory.weights(a)
    total = theory.weight_sum(steps, a)
    assert total == pytest.approx(math.fsum(map(weight, range(steps))), rel=1e-13)
    assert total >= steps**3 / 3


@pytest.mark.parametrize(
    ("a", "power"), [(17, 2), (0.5, 2), (526_321, 2), (1, 1), (1, 0)]
)
@pytest.mark.parametrize("steps", [1, 2, 60])
def test_running_average_is_the_weighted_sum(steps, a, power):
    rng = np.random.default_rng(steps)
    path = {"w": rng.normal(size=(steps, 4, 3)), "b": rng.normal(size=(steps, 4))}
    average = theory.running_average(theory.weights(a, power))

    @jax.jit
    def run(path):
        first = jax.tree.map(lambda x: x[0], path)
        return jax.lax.scan(
            lambda state, x: (average.update(state, x), None), average.init(first), path
        )[0]

    with jax.enable_x64(True):
        state = run(path)
    w = np.array([(a + t) ** power for t in range(steps)], float)
    for name, value in path.items():
        expected = np.tensordot(w, value, 1) / w.sum()
        np.testing.assert_allclose(state.mean[name], expected, rtol=1e-12, atol=1e-14)
    assert state.step == steps
    np.testing.assert_allclose(state.total, w.sum(), rtol=1e-12)


def test_workers_averages_average_to_the_output_of_the_theorem():
    path = np.random.default_rng(0).normal(size=(20, 8, 3)).astype(np.float32)
    average = theory.running_average(theory.weights(34))
    update = jax.jit(jax.vmap(average.update))
    state = jax.vmap(average.init)(path[0])
    for x in path:
        state = update(state, x)
    w = (34.0 + np.arange(20)) ** 2
    expected = np.einsum("t,tkd->d", w, path) / (8 * theory.weight_sum(20, 34))
    np.testing.assert_allclose(state.mean.mean(0), expected, rtol=1e-5, atol=1e-6)


def test_running_average_holds_low_precision_in_float32():
    path = jnp.arange(1000).astype(jnp.bfloat16) % 2
    average = theory.running_average(theory.weights(1, power=0))
    state = average.init(path[0])  # Scan refuses a state that changes its type.
    state, _ = jax.lax.scan(lambda s, x: (average.update(s, x), None), state, path)
    assert state.mean.dtype == jnp.float32
    np.testing.assert_allclose(state.mean, np.mean(path, dtype=float), rtol=1e-5)


# The lemmas.


def test_lemmas_in_numbers():
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
    spread = np.mean(np.sum((workers - mean) ** 2, axis=1))
    distance, gap = np.sum(mean**2), np.sum(scales * mean**2) / 2
    assert after <= theory.descent(distance, gap, variance, spread, eta, 0.5, 4.0)


def test_drift_holds_for_workers_that_run_apart_and_half_of_it_does_not():
    # f(x) = −G|x| from 0: the first sample's sign decides, then all steps are one way.
    # η halves at t, the most that ηₜ ≤ 2ηₜ₊ₕ allows.
    period, second_moment, eta = 8, 9.0, 0.1
    reach = (period - 1) * 2 * eta * math.sqrt(second_moment)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T
    apart = reach * (signs - signs.mean(1, keepdims=True))
    limit = theory.drift(eta, second_moment, period)
    assert limit / 2 < np.mean(apart**2) <= limit


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
    # The recursion with equality, and as much eₜ as keeps rₜ₊₁ = 0.
    mu, scale = 0.7, 0.3
    eta, r, total = theory.stepsize(mu, a), first, 0.0
    for t in range(steps):
        spent = (1 - mu * eta(t)) * r + eta(t) ** 2 * noise + eta(t) ** 3 * drift
        total += (a + t) ** 2 * spent / (eta(t) * scale)
        r = 0.0
    left = scale * total / theory.weight_sum(steps, a)
    right = sum(theory.telescope(first, noise, drift, mu=mu, steps=steps, a=a))
    assert left / right == pytest.approx(tightness(a, steps), rel=1e-10)


def test_lemmas_1_to_3_are_the_recursion_of_lemma_4():
    mu, smoothness, variance, second_moment = UNEVEN
    run, a, r, gap = Run(workers=3, period=5, steps=40, batch=2), 100, 2.0, 0.3
    eta = theory.stepsize(mu, a)(4)
    noise = theory.mean_variance(variance, run.workers, run.batch)
    spread = theory.drift(eta, second_moment, run.period)
    curve = 8 * second_moment * run.period**2 * smoothness
    expected = (1 - mu * eta) * r - eta * gap / 2 + eta**2 * noise + eta**3 * curve
    got = theory.descent(r, gap, noise, spread, eta, mu, smoothness)
    assert got == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("constants", [ONES, UNEVEN])
@pytest.mark.parametrize("run", [Run(1, 1, 1), Run(3, 5, 40, batch=2), Run(8, 40, 40)])
def test_lemmas_give_the_theorem(constants, run):
    mu, smoothness, variance, second_moment = constants
    noise = theory.mean_variance(variance, run.workers, run.batch)
    curve = 8 * second_moment * run.period**2 * smoothness
    unrolled = theory.telescope(2.0, noise, curve, mu=mu, steps=run.steps, a=100)
    expected = [2 * term for term in unrolled]  # A = ½
    assert theory.bound(constants, run, 2.0, a=100) == pytest.approx(expected)


# The theorems, in numbers and in their degenerate cases.


def test_theorem_in_numbers():
    run = Run(workers=4, period=4, steps=1000)
    terms = theory.bound(ONES, run, distance=1.0, a=17)
    assert theory.weight_sum(1000, 17) == 350_105_500
    assert terms == pytest.approx((7.016457e-6, 2.953395e-3, 1.169933e-2), rel=1e-6)
    assert sum(terms) == pytest.approx(1.465974e-2, rel=1e-6)
    longer = theory.bound(ONES, run._replace(steps=10_000), distance=1.0, a=17)
    assert sum(longer) == pytest.approx(4.218159e-4, rel=1e-6)


def test_batch_and_workers_divide_the_noise_alike():
    few, many = Run(12, 4, 100), Run(4, 4, 100, batch=3)
    alone = few._replace(workers=1)
    for statement, arguments in ((theory.bound, (1.0, 100)), (theory.rate, ())):
        terms = statement(UNEVEN, few, *arguments)
        assert terms == pytest.approx(statement(UNEVEN, many, *arguments), rel=1e-14)
        noise = statement(UNEVEN, alone, *arguments).noise
        assert terms.noise == pytest.approx(noise / 12)


@pytest.mark.parametrize("steps", [1, 30])
def test_one_shot_is_the_theorem_with_one_round(steps):
    run = Run(workers=4, period=1, steps=steps)
    once = theory.one_shot_bound(UNEVEN, run, 1.0, a=97)
    assert once == theory.bound(UNEVEN, run._replace(period=steps), 1.0, a=97)


@pytest.mark.parametrize(("workers", "steps"), [(1, 10**5), (64, 10**7)])
def test_one_shot_bound_stalls(workers, steps):
    run = Run(workers, 1, steps)
    terms = theory.one_shot_bound(UNEVEN, run, 1.0, a=steps + 1)
    stall = 768 / 7 * (3.0 / 0.5) * 11.0 / 0.5
    assert terms.drift == pytest.approx(stall, rel=1e-3)


def test_corollary_is_the_theorem_after_many_steps():
    # T ≫ a ≫ 1 makes S_T = T³/3 and ‖x₀ − x*‖² = 4G²/μ² the only losses.
    run = Run(workers=3, period=500, steps=10**8, batch=2)
    distance = 4 * 11.0 / 0.5**2
    terms = theory.bound(UNEVEN, run, distance, a=500.001)
    assert theory.rate(UNEVEN, run) == pytest.approx(terms, rel=1e-4)


@pytest.mark.parametrize("run", [Run(1, 1, 1), Run(4, 10, 50), Run(2, 300, 300)])
def test_corollary_is_above_the_theorem(run):
    a = math.nextafter(max(16 * 6.0, run.period), math.inf)
    terms = theory.bound(UNEVEN, run, 4 * 11.0 / 0.5**2, a)
    rates = theory.rate(UNEVEN, run)
    assert all(t <= r * (1 + 1e-12) for t, r in zip(terms, rates, strict=True))


def test_corollary_in_numbers():
    # κ = 6, a = 96: 6·96³·11/(½·40³); (12/(½·3·40) + 24·96/(½·3·40²))·7/2;
    # 768·6·5²·11/(½·40²).
    expected = (1824.768, 4.06, 1584.0)
    assert theory.rate(UNEVEN, Run(3, 5, 40, batch=2)) == pytest.approx(expected)


@pytest.mark.parametrize(("workers", "steps"), [(1, 10**6), (4, 10**6), (4, 4 * 10**6)])
def test_longest_period_balances_drift_and_noise(workers, steps):
    run, a = Run(workers, 1, steps), 500
    longest = theory.longest_period(ONES, run, a)
    below = theory.bound(ONES, run._replace(period=longest), 0.0, a)
    above = theory.bound(ONES, run._replace(period=longest + 1), 0.0, a)
    assert below.drift <= below.noise and above.drift > above.noise
    assert longest == pytest.approx(math.sqrt(steps / (64 * workers)), abs=1)


@pytest.mark.parametrize(
    ("constants", "run", "a", "expected"),
    [
        (ONES, Run(1, 1, 10**6), 17, 16),  # H < a
        (ONES, Run(1, 1, 10**6), 17.5, 17),
        (Constants(1.0, 1.0, 1.0, 1e-4), Run(1, 1, 6), 40, 6),  # H ≤ T
        (Constants(1.0, 1.0, 0.0, 1.0), Run(1, 1, 6), 40, 1),  # never below 1
    ],
)
def test_longest_period_stays_within_the_theorem(constants, run, a, expected):
    assert theory.longest_period(constants, run, a) == expected
    theory.bound(constants, run._replace(period=expected), 1.0, a)


def test_asynchronous_theorem_has_a_longer_reach_and_its_own_constant():
    run = Run(workers=4, period=4, steps=1000, batch=2)
    now = theory.asynchronous_bound(UNEVEN, run, 1.0, 100, delay=0, coefficient=256)
    assert now == theory.bound(UNEVEN, run, 1.0, 100)
    late = theory.asynchronous_bound(UNEVEN, run, 1.0, 100, delay=8)
    assert late == pytest.approx((now.start, now.noise, 27 * now.drift), rel=1e-14)


@pytest.mark.parametrize("late", [False, True])
def test_asynchronous_constants_are_those_derived(late):
    # The sum in the docstring at the smallest a, with the steps that exist: j = t − m.
    for period in range(1, 12):
        for delay in range(12):
            a = period + delay
            missing = period + delay - 1 if late else delay
            own, older = range(1, period), range(period, period + missing)
            for t in (0, 1, period, 3 * a, 100 * a):
                grown = {m: (a + t) / (a + t - m) for m in (*own, *older) if m <= t}
                total = sum((2 if m in own else 1) * g for m, g in grown.items())
                assert total <= (5.5 if late else 3) * (period + delay)


# The theorems against simulation. Coordinatewise, f(x) = ½dx² with d = d₊ above 0 and
# d₋ below, and ∇fᵢ(x) = dx − sξ with a random sign ξ. Only if d₊ ≠ d₋ is f not
# quadratic; only then do the local steps change the path of the workers' mean.


class Problem(NamedTuple):
    constants: Constants
    slopes: np.ndarray  # (2, d): d₋ and d₊
    spread: np.ndarray
    start: np.ndarray

    @property
    def distance(self):
        return float(np.sum(self.start**2))

    def slope(self, x):
        return np.where(x > 0, self.slopes[1], self.slopes[0])

    def gradient(self, x, signs):
        return self.slope(x) * x - self.spread * signs

    def error(self, x):
        return np.mean(np.sum(self.slope(x) * x**2, axis=-1)) / 2


def problem(below, above, spread, start):
    """Its exact constants: as η ≤ 1/L, no |x| ever exceeds max(|x₀|, s/min d)."""
    slopes, spread, start = np.array([below, above]), np.array(spread), np.array(start)
    variance = float(np.sum(spread**2))
    reach = np.maximum(np.abs(start), spread / slopes.min(0))
    second_moment = float(np.sum((slopes.max(0) * reach) ** 2)) + variance
    mu, smoothness = float(slopes.min()), float(slopes.max())
    constants = Constants(mu, smoothness, variance, second_moment)
    return Problem(constants, slopes, spread, start)


PROBLEMS = {
    "round": problem([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.1, -0.05]),
    "long": problem([0.5, 2.0], [0.5, 2.0], [0.5, 2.0], [0.3, 0.1]),
    "far": problem([0.5, 2.0], [0.5, 2.0], [0.05, 0.2], [-5.0, 5.0]),
    "exact": problem([0.5, 2.0], [0.5, 2.0], [0.0, 0.0], [1.0, 1.0]),
    "bent": problem([0.5, 1.0], [2.0, 1.0], [3.0, 1.0], [0.1, 0.1]),
}
SEEDS = 200


def signs(workers, steps):
    rng = np.random.default_rng(workers * 10_007 + steps)
    for _ in range(steps):
        yield 2.0 * rng.integers(0, 2, size=(SEEDS, workers, 2)) - 1


def local_sgd(problem, workers, period, steps, a):
    """Mean error of the weighted average over seeds: Algorithm 1."""
    x = np.tile(problem.start, (SEEDS, workers, 1))
    total = np.zeros((SEEDS, 2))
    for t, drawn in enumerate(signs(workers, steps)):
        total += (a + t) ** 2 * x.mean(1)
        x = x - 4 / (problem.constants.mu * (a + t)) * problem.gradient(x, drawn)
        if (t + 1) % period == 0:
            x = np.broadcast_to(x.mean(1, keepdims=True), x.shape)
    return problem.error(total / sum((a + t) ** 2 for t in range(steps)))


def asynchronous_sgd(problem, workers, period, steps, a, delay):
    """The same when workers synchronise at staggered times and write late."""
    x = np.tile(problem.start, (SEEDS, workers, 1))
    read, shared, total = x.copy(), x[:, 0].copy(), np.zeros((SEEDS, 2))
    pending = []
    for t, drawn in enumerate(signs(workers, steps)):
        total += (a + t) ** 2 * x.mean(1)
        x = x - 4 / (problem.constants.mu * (a + t)) * problem.gradient(x, drawn)
        due = [k for k in range(workers) if (t + 1 + k) % period == 0]
        pending += [(t + delay, x[:, k] - read[:, k]) for k in due]
        shared = shared + sum(change for at, change in pending if at == t) / workers
        pending = [(at, change) for at, change in pending if at > t]
        x[:, due] = read[:, due] = shared[:, None]
    return problem.error(total / sum((a + t) ** 2 for t in range(steps)))


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("workers", [1, 4, 16])
@pytest.mark.parametrize(
    ("period", "steps"),
    [(1, 1), (1, 60), (7, 60), (60, 60), (1, 600), (25, 600), (600, 600)],
)
def test_error_is_under_the_bound(name, workers, period, steps):
    problem, run = PROBLEMS[name], Run(workers, period, steps)
    a = theory.shift(problem.constants.mu, problem.constants.smoothness, period)
    limit = sum(theory.bound(problem.constants, run, problem.distance, a))
    assert 0 < local_sgd(problem, workers, period, steps, a) <= limit


@pytest.mark.parametrize(
    ("name", "workers", "steps"),
    [("round", 1, 600), ("round", 4, 600), ("round", 64, 600)]
    + [("exact", 1, 1), ("exact", 4, 60), ("bent", 16, 60)],
)
def test_without_drift_the_other_terms_suffice(name, workers, steps):
    problem = PROBLEMS[name]
    a = theory.shift(problem.constants.mu, problem.constants.smoothness, period=1)
    run = Run(workers, 1, steps)
    terms = theory.bound(problem.constants, run, problem.distance, a)
    error = local_sgd(problem, workers, 1, steps, a)
    assert error <= terms.start + terms.noise <= 30 * error


def test_with_drift_they_do_not():
    # Only here: f is not quadratic, x₀ = x* and a thousand workers leave little noise.
    problem = PROBLEMS["bent"]._replace(start=np.zeros(2))
    run = Run(workers=1000, period=100, steps=100)
    terms = theory.bound(problem.constants, run, problem.distance, a=101)
    error = local_sgd(problem, 1000, 100, 100, a=101)
    assert 2 * (terms.start + terms.noise) < error <= sum(terms)


@pytest.mark.parametrize("name", ["round", "far", "bent"])
@pytest.mark.parametrize(("period", "delay"), [(1, 0), (1, 5), (8, 0), (8, 12)])
def test_asynchronous_error_is_under_the_bound(name, period, delay):
    problem, run = PROBLEMS[name], Run(workers=4, period=period, steps=200)
    mu, smoothness, *_ = problem.constants
    a = theory.shift(mu, smoothness, period, delay)
    terms = theory.asynchronous_bound(
        problem.constants, run, problem.distance, a, delay, coefficient=576
    )
    assert 0 < asynchronous_sgd(problem, 4, period, 200, a, delay) <= sum(terms)


def test_asynchronous_workers_that_wait_for_nothing_are_synchronous():
    error = asynchronous_sgd(PROBLEMS["bent"], 4, 1, 50, 65, delay=0)
    assert error == pytest.approx(local_sgd(PROBLEMS["bent"], 4, 1, 50, 65))


# The speedup model.

RATIO = 25  # ρ
POWERS = [2**i for i in range(16)]


@pytest.mark.parametrize(
    ("period", "workers", "expected"),
    [(1, 2, "0.039"), (1, 16, "0.021"), (16, 2, "0.485"), (16, 16, "0.334")]
    + [(64, 16, "1.258"), (256, 16, "4.07"), (256, 128, "4.96")]
    + [(1024, 16, "9.24"), (1024, 128, "17.8"), (1024, 1024, "20.1")],
)
def test_speedup_of_communication_alone(period, workers, expected):
    digits = len(expected.split(".")[1])
    assert f"{theory.speedup(workers, period, RATIO):.{digits}f}" == expected
    assert f"{theory.corrected_speedup(workers, period, RATIO):.{digits}f}" == expected


@pytest.mark.parametrize(
    ("accuracy", "workers", "expected", "best"),
    [(1e-4, 2, "0.955", 64), (1e-4, 4, "0.982", 128), (1e-4, 16, "0.750", 128)]
    + [(1e-5, 2, "1.336", 128), (1e-5, 8, "1.932", 256), (1e-5, 16, "1.855", 256)]
    + [(1e-6, 2, "1.631", 512), (1e-6, 16, "3.959", 512), (1e-8, 2, "1.913", 2048)]
    + [(1e-8, 16, "10.2", 2048), (1e-8, 128, "17.7", 2048), (5e-3, 2, "0.357", 32)],
)
def test_best_period_and_its_speedup(accuracy, workers, expected, best):
    found = max((theory.speedup(workers, h, RATIO, accuracy), h) for h in POWERS)
    digits = len(expected.split(".")[1])
    assert (f"{found[0]:.{digits}f}", found[1]) == (expected, best)


def test_coarse_accuracy_allows_no_speedup_at_all():
    assert (
        max(theory.speedup(k, h, RATIO, 5e-3) for k in POWERS[1:] for h in POWERS) < 1
    )


@pytest.mark.parametrize("period", [1, 16, 1024])
def test_speedup_of_many_workers_is_half_the_period_over_the_ratio(period):
    limit = period / (2 * RATIO)
    assert theory.speedup(10**9, period, RATIO) == pytest.approx(limit, rel=1e-4)


@pytest.mark.parametrize("model", [theory.speedup, theory.corrected_speedup])
def test_free_communication_and_exact_averages_scale_linearly(model):
    assert [model(k, 8, ratio=0) for k in (1, 2, 64)] == [1, 2, 64]
    assert model(1, 8, RATIO) == 1


@pytest.mark.parametrize("accuracy", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize(("workers", "period"), [(1, 1), (2, 1), (4, 32), (64, 1000)])
def test_corrected_speedup_solves_the_corollary(workers, period, accuracy):
    # εT² − T/K − (1 + H)/K − H² = 0
    roots = np.roots([accuracy, -1 / workers, -(1 + period) / workers - period**2])
    expected = 1 / accuracy / roots.max() / (1 + 2 * RATIO * (workers - 1) / period)
    got = theory.corrected_speedup(workers, period, RATIO, accuracy)
    assert got == pytest.approx(expected, rel=1e-9)


# Refusals.

RUN = Run(workers=4, period=4, steps=100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.stepsize(0, 17), "stepsize(mu): mu must be positive, got 0"),
        (lambda: theory.stepsize(math.nan, 17), "mu must be positive, got nan"),
        (lambda: theory.stepsize(1, 1), "stepsize(a): a must exceed 1, got 1"),
        (
            lambda: theory.shift(1, 0.5, 1),
            "mu must be at most smoothness, got 1 and 0.5",
        ),
        (
            lambda: theory.shift(1, 1, 0),
            "shift(period): period must be at least 1, got 0",
        ),
        (lambda: theory.shift(1, 1, 1, -1), "delay must be at least 0, got -1"),
        (lambda: theory.weights(0), "weights(a): a must be positive, got 0"),
        (lambda: theory.weights(1, -1), "power must be at least 0, got -1"),
        (lambda: theory.weight_sum(0, 17), "steps must be at least 1, got 0"),
        (lambda: theory.weight_sum(1, 0.5), "a must be at least 1, got 0.5"),
        (
            lambda: theory.descent(1, 1, 1, 1, 0.2, 1, 2),
            "learning_rate must be at most 1/(4 smoothness) = 0.125, got 0.2",
        ),
        (lambda: theory.mean_variance(1.0, 0), "workers must be at least 1, got 0"),
        (lambda: theory.mean_variance(1.0, 1, 0), "batch must be at least 1, got 0"),
        (lambda: theory.drift(0.1, 1.0, 0), "drift(period): period must be at least 1"),
        (lambda: theory.telescope(1, 1, 1, mu=0, steps=1, a=2), "mu must be positive"),
        (
            lambda: theory.telescope(1, 1, 1, mu=1, steps=1, a=1),
            "a must exceed 1, got 1",
        ),
        (
            lambda: theory.longest_period(ONES._replace(second_moment=0.0), RUN, 17),
            "second_moment must be positive, got 0.0",
        ),
        (lambda: theory.speedup(0, 1, 1), "workers must be at least 1, got 0"),
        (lambda: theory.speedup(1, 1, -1), "ratio must be at least 0, got -1"),
        (lambda: theory.corrected_speedup(1, 0, 1), "period must be at least 1, got 0"),
        (lambda: theory.corrected_speedup(1, 1, 1, -1), "accuracy must be at least 0"),
        (
            lambda: theory.asynchronous_bound(ONES, RUN, 1.0, 17, delay=13),
            "a must exceed max(16 kappa, H) = 17, got 17",
        ),
        (
            lambda: theory.asynchronous_bound(ONES, RUN, 1.0, 999, delay=97),
            "period + delay must be at most steps = 100, got 4 and 97",
        ),
        (
            lambda: theory.asynchronous_bound(ONES, RUN, 1.0, 17, delay=-1),
            "delay must be at least 0, got -1",
        ),
        (
            lambda: theory.one_shot_bound(ONES, RUN, 1.0, 100),
            "a must exceed max(16 kappa, H) = 100, got 100",
        ),
        (lambda: theory.logistic_curvature(np.eye(2), 0), "penalty must be positive"),
        (lambda: theory.quadratic_curvature(np.diag([1, 0])), "positive definite"),
        (lambda: theory.quadratic_curvature([[1, 1], [0, 1]]), "must be symmetric"),
        (lambda: theory.estimate(None, None, [], 1.0, 1.0), "at least 1 point, got 0"),
        (lambda: theory.estimate(None, None, [1], 2.0, 1.0), "got 2.0 and 1.0"),
        (lambda: theory.curvature(None, None, []), "at least 1 point, got 0"),
        (
            lambda: theory.curvature(lambda x, _: x**0.5, jnp.ones(2), [-1.0]),
            "its Hessian must be finite, got nan",
        ),
    ],
)
def test_impossible_arguments_are_refused(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize("statement", ["bound", "rate", "asynchronous_bound"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": 0.0}, "(mu): mu must be positive, got 0.0"),
        (
            {"mu": 2.0},
            "(mu, smoothness): mu must be at most smoothness, got 2.0 and 1.0",
        ),
        ({"variance": -1.0}, "(variance): variance must be at least 0, got -1.0"),
        ({"second_moment": -1.0}, "second_moment must be at least 0, got -1.0"),
        ({"workers": 0}, "(workers): workers must be at least 1, got 0"),
        ({"period": 0}, "(period): period must be at least 1, got 0"),
        ({"steps": 0}, "(steps): steps must be at least 1, got 0"),
        ({"batch": 0}, "(batch): batch must be at least 1, got 0"),
        ({"steps": 3}, "(period, steps): period must be at most steps, got 4 and 3"),
    ],
)
def test_impossible_constants_are_refused(statement, changes, message):
    def changed(table):
        return table._replace(
            **{k: v for k, v in changes.items() if k in table._fields}
        )

    arguments = {"bound": (1.0, 17), "rate": (), "asynchronous_bound": (1.0, 17, 1)}
    with pytest.raises(ValueError) as error:
        getattr(theory, statement)(changed(ONES), changed(RUN), *arguments[statement])
    assert str(error.value).startswith(statement) and message in str(error.value)


@pytest.mark.parametrize(
    ("period", "a"), [(4, 16), (20, 20), (20, 19.5), (4, math.nan)]
)
def test_small_shift_is_refused(period, a):
    least = max(16.0, period)
    message = f"bound(a): a must exceed max(16 kappa, H) = {least}, got {a}"
    with pytest.raises(ValueError) as error:
        theory.bound(ONES, RUN._replace(period=period), 1.0, a)
    assert str(error.value) == message


def test_negative_distance_is_refused():
    with pytest.raises(
        ValueError, match=r"bound\(distance\): distance must be at least"
    ):
        theory.bound(ONES, RUN, -1.0, 17)


# Constants of problems.


def test_estimate_is_exact_on_a_quadratic_of_any_pytree():
    constants, slopes, spread, start = PROBLEMS["round"]
    corners = jnp.array([[s, t] for s in (-1.0, 1.0) for t in (-1.0, 1.0)])

    def loss(params, signs):
        x = jnp.stack([params["first"], params["second"]])
        return jnp.sum(slopes[0] * x**2 / 2 - spread * signs * x)

    path = [{"first": c * start[0], "second": c * start[1]} for c in (0.1, 1.0, 0.5)]
    curvature = theory.quadratic_curvature(np.diag(slopes[0]))
    got = theory.estimate(loss, corners, path, *curvature)
    assert all(type(value) is float for value in got)
    # σ² = 1 + 1, G² = σ² + 0.1² + 0.05²: the largest on the path.
    assert got == pytest.approx((1.0, 1.0, 2.0, 2.0125), rel=1e-6)
    assert got.second_moment <= constants.second_moment


def test_quadratic_curvature_of_a_full_matrix():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    hessian = basis @ np.diag([7.0, 0.25, 1.0, 2.0, 3.0]) @ basis.T
    assert theory.quadratic_curvature(hessian) == pytest.approx((0.25, 7.0))


@pytest.mark.parametrize(("distance", "attained"), [(0, 1), (1, None), (1e4, 0)])
def test_logistic_curvature_is_the_range_of_the_hessian(distance, attained):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 4)) * [3.0, 1.0, 1.0, 0.1]
    curvature = theory.logistic_curvature(features, 0.1)
    slope = 1 / (1 + np.exp(np.minimum(features @ np.full(4, distance), 500)))
    hessian = features.T * (slope * (1 - slope)) @ features / 30 + 0.1 * np.eye(4)
    range_here = np.linalg.eigvalsh(hessian)[[0, -1]]
    slack = 1e-12
    assert (
        curvature[0] - slack <= range_here[0] <= range_here[1] <= curvature[1] + slack
    )
    if attained is not None:  # L at 0, μ far from it
        assert range_here[-attained] == pytest.approx(curvature[attained], rel=1e-9)


def rotated(eigenvalues):
    """A quadratic of a pytree whose Hessian has these eigenvalues."""
    count = len(eigenvalues)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(count, count)))[0]
    hessian = basis @ np.diag(eigenvalues) @ basis.T

    def loss(params, example):
        x = jnp.concatenate([params["first"], params["second"].ravel()])
        return x @ jnp.asarray(hessian, jnp.float32) @ x / 2 - jnp.dot(example, x)

    start = {"first": jnp.ones(count - 4), "second": jnp.ones((2, 2))}
    return loss, jnp.ones((3, count)), start, hessian


def test_curvature_is_that_of_a_quadratic():
    loss, examples, start, hessian = rotated(np.geomspace(0.01, 7.0, 12))
    found = theory.curvature(loss, examples, [start])
    assert all(type(value) is float for value in found)
    assert found == pytest.approx(theory.quadratic_curvature(hessian), rel=5e-3)


def test_curvature_is_that_of_logistic_regression():
    """L is attained at 0 and μ far away: each point of a path has its part."""
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


@pytest.mark.parametrize("iterations", [5, 10, 20, 512])
def test_curvature_errs_to_the_safe_side(iterations):
    """Ended before it has converged, it returns an interval that is too large."""
    eigenvalues = np.geomspace(0.001, 1.0, 60)
    loss, examples, start, _ = rotated(eigenvalues)
    mu, smoothness = theory.curvature(loss, examples, [start], iterations)
    assert mu <= eigenvalues[0] and smoothness >= eigenvalues[-1]
    if iterations == 512:
        assert (mu, smoothness) == pytest.approx((0.001, 1.0), rel=0.02)


def test_curvature_without_strong_convexity():
    loss, examples, start, _ = rotated(np.linspace(-2.0, 5.0, 9))
    assert theory.curvature(loss, examples, [start]) == pytest.approx(
        (-2.0, 5.0), rel=1e-3
    )
    # Flat but for rounding is not strongly convex either.
    features = np.random.default_rng(0).normal(size=(5, 20)).astype(np.float32)
    flat, _ = theory.curvature(
        lambda x, a: jax.nn.softplus(jnp.dot(a, x)), features, [np.zeros(20)]
    )
    assert -1e-4 < flat <= 0


def test_curvature_of_half_precision_is_computed_in_float32():
    loss, examples, start, hessian = rotated(np.geomspace(0.01, 7.0, 12))
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
    """The minimiser of regularised logistic regression, and the minimum."""
    x = np.zeros(features.shape[1])
    for _ in range(10):
        margins = labels * (features @ x)
        wrong = 1 / (1 + np.exp(margins))
        gradient = -(features.T @ (labels * wrong)) / len(labels) + penalty * x
        weighted = features.multiply((wrong * (1 - wrong))[:, None]).tocsr()
        hessian = (features.T @ weighted).toarray() / len(labels)
        x = x - np.linalg.solve(hessian + penalty * np.eye(len(x)), gradient)
    value = np.mean(np.logaddexp(0, -labels * (features @ x))) + penalty * x @ x / 2
    return x, value


@pytest.mark.parametrize("name", DATA)
def test_constants_of_real_data(name):
    if "LOCALSGD_DATA" not in os.environ:
        pytest.skip("LOCALSGD_DATA does not name the folder with w8a and a9a")
    datasets = pytest.importorskip("sklearn.datasets")
    known = DATA[name]
    path = str(Path(os.environ["LOCALSGD_DATA"]) / name)
    sparse, labels = datasets.load_svmlight_file(path, n_features=known["features"])
    penalty = 1 / len(labels)
    optimum, value = newton(sparse, labels, penalty)
    features = sparse.toarray()

    def loss(x, example):
        margin = example[1] * jnp.dot(example[0], x)
        return jax.nn.softplus(-margin) + penalty * jnp.sum(x**2) / 2

    curvature = theory.logistic_curvature(features, penalty)
    examples = (features.astype(np.float32), labels.astype(np.float32))
    start = np.zeros_like(optimum)
    first = theory.estimate(loss, examples, [start], *curvature)
    last = theory.estimate(loss, examples, [optimum], *curvature)
    assert curvature == pytest.approx((known["mu"], known["smoothness"]), rel=3e-6)
    assert first.smoothness / first.mu == pytest.approx(known["kappa"], rel=3e-6)
    assert first[2:] == pytest.approx(known["start"], rel=3e-6)
    assert last.variance == pytest.approx(known["optimal_variance"], rel=5e-6)
    assert value == pytest.approx(known["optimum"], rel=1e-12)
    assert np.linalg.norm(optimum) == pytest.approx(known["norm"], rel=3e-6)
