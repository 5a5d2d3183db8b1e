"""Theorems 2.2 and 5.1 and Corollary 2.3: numbers and special cases."""

import math

import pytest
from harness.theory_problems import ONES, UNEVEN

from localsgd_jax import theory
from localsgd_jax.theory import Constants, RunParameters


def test_bound_matches_the_paper():
    run = RunParameters(workers=4, period=4, steps=1000)
    terms = theory.bound(ONES, run, distance=1.0, a=17)
    assert theory.weight_sum(1000, 17) == 350_105_500
    assert terms == pytest.approx((7.016457e-6, 2.953395e-3, 1.169933e-2), rel=1e-6)
    assert sum(terms) == pytest.approx(1.465974e-2, rel=1e-6)
    longer = theory.bound(ONES, run._replace(steps=10_000), distance=1.0, a=17)
    assert sum(longer) == pytest.approx(4.218159e-4, rel=1e-6)


def test_batch_and_workers_divide_the_noise_equally():
    few, many = RunParameters(12, 4, 100), RunParameters(4, 4, 100, batch=3)
    single = few._replace(workers=1)
    for statement, arguments in ((theory.bound, (1.0, 100)), (theory.rate, ())):
        terms = statement(UNEVEN, few, *arguments)
        assert terms == pytest.approx(statement(UNEVEN, many, *arguments), rel=1e-14)
        noise = statement(UNEVEN, single, *arguments).noise
        assert terms.noise == pytest.approx(noise / 12)


@pytest.mark.parametrize("steps", [1, 30])
def test_one_shot_bound_is_theorem_2_2_with_one_round(steps):
    run = RunParameters(workers=4, period=1, steps=steps)
    once = theory.one_shot_bound(UNEVEN, run, 1.0, a=97)
    assert once == theory.bound(UNEVEN, run._replace(period=steps), 1.0, a=97)


@pytest.mark.parametrize(("workers", "steps"), [(1, 10**5), (64, 10**7)])
def test_one_shot_bound_does_not_vanish(workers, steps):
    run = RunParameters(workers, 1, steps)
    terms = theory.one_shot_bound(UNEVEN, run, 1.0, a=steps + 1)
    limit = 768 / 7 * (3.0 / 0.5) * 11.0 / 0.5
    assert terms.drift == pytest.approx(limit, rel=1e-3)


def test_corollary_2_3_approaches_theorem_2_2_after_many_steps():
    # For T ≫ a ≫ 1, S_T ≈ T³/3. The distance is the largest allowed one, 4G²/μ².
    run = RunParameters(workers=3, period=500, steps=10**8, batch=2)
    distance = 4 * 11.0 / 0.5**2
    terms = theory.bound(UNEVEN, run, distance, a=500.001)
    assert theory.rate(UNEVEN, run) == pytest.approx(terms, rel=1e-4)


@pytest.mark.parametrize(
    "run",
    [RunParameters(1, 1, 1), RunParameters(4, 10, 50), RunParameters(2, 300, 300)],
)
def test_corollary_2_3_is_above_theorem_2_2(run):
    a = math.nextafter(max(16 * 6.0, run.period), math.inf)
    terms = theory.bound(UNEVEN, run, 4 * 11.0 / 0.5**2, a)
    rates = theory.rate(UNEVEN, run)
    assert all(t <= r * (1 + 1e-12) for t, r in zip(terms, rates, strict=True))


def test_rate_matches_hand_computation():
    # κ = 6, a = 96: 6·96³·11/(½·40³); (12/(½·3·40) + 24·96/(½·3·40²))·7/2;
    # 768·6·5²·11/(½·40²).
    expected = (1824.768, 4.06, 1584.0)
    assert theory.rate(UNEVEN, RunParameters(3, 5, 40, batch=2)) == pytest.approx(
        expected
    )


@pytest.mark.parametrize(("workers", "steps"), [(1, 10**6), (4, 10**6), (4, 4 * 10**6)])
def test_longest_period_balances_drift_and_noise(workers, steps):
    run, a = RunParameters(workers, 1, steps), 500
    longest = theory.longest_period(ONES, run, a)
    below = theory.bound(ONES, run._replace(period=longest), 0.0, a)
    above = theory.bound(ONES, run._replace(period=longest + 1), 0.0, a)
    assert below.drift <= below.noise and above.drift > above.noise
    assert longest == pytest.approx(math.sqrt(steps / (64 * workers)), abs=1)


@pytest.mark.parametrize(
    ("constants", "run", "a", "expected"),
    [
        (ONES, RunParameters(1, 1, 10**6), 17, 16),  # H < a
        (ONES, RunParameters(1, 1, 10**6), 17.5, 17),
        (Constants(1.0, 1.0, 1.0, 1e-4), RunParameters(1, 1, 6), 40, 6),  # H ≤ T
        (Constants(1.0, 1.0, 0.0, 1.0), RunParameters(1, 1, 6), 40, 1),  # At least 1.
    ],
)
def test_longest_period_satisfies_theorem_2_2(constants, run, a, expected):
    assert theory.longest_period(constants, run, a) == expected
    theory.bound(constants, run._replace(period=expected), 1.0, a)


def test_asynchronous_bound_is_theorem_2_2_with_h_plus_tau():
    run = RunParameters(workers=4, period=4, steps=1000, batch=2)
    undelayed = theory.asynchronous_bound(
        UNEVEN, run, 1.0, 100, delay=0, coefficient=256
    )
    assert undelayed == theory.bound(UNEVEN, run, 1.0, 100)
    delayed = theory.asynchronous_bound(UNEVEN, run, 1.0, 100, delay=8)
    expected = (undelayed.initial, undelayed.noise, 27 * undelayed.drift)
    assert delayed == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("counts_from_write", [False, True])
def test_asynchronous_constants_match_the_derivation(counts_from_write):
    # The sum in the docstring for the smallest a, over existing steps j = t − m.
    for period in range(1, 12):
        for delay in range(12):
            a = period + delay
            missing = period + delay - 1 if counts_from_write else delay
            local, older = range(1, period), range(period, period + missing)
            for t in (0, 1, period, 3 * a, 100 * a):
                grown = {m: (a + t) / (a + t - m) for m in (*local, *older) if m <= t}
                total = sum((2 if m in local else 1) * g for m, g in grown.items())
                assert total <= (5.5 if counts_from_write else 3) * (period + delay)
