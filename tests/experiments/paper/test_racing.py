"""Racing of step sizes, against exhaustive search."""

import numpy as np
import pytest
from harness.selection import keep

from localsgd_jax.experiments.paper import racing


def random_curves(seed, shape=(4, 3, 6)):
    """Errors that fall as powers of t, some of them to a level above the target."""
    rng = np.random.default_rng(seed)
    power, scale = rng.uniform(0.5, 3, shape), rng.uniform(3, 30, shape)
    floor = np.where(rng.random(shape) < 0.3, 0.02, 0.0)
    return lambda t: 100 * (1 + t / scale) ** -power + floor


def run_race(errors, limit, best=np.inf, target=0.01):
    """Runs a race over known errors; returns it and the number of evaluations."""
    shape, evaluations = errors(1).shape, []
    race = racing.Race(shape, target, start=100.0, best=best)

    def errors_of(points):
        evaluations.append(len(points))
        return points[:, 0].astype(float)

    for t in racing.evaluation_steps(limit):
        race.evaluate(t, errors(t)[..., None], errors_of, last=t == limit)
        if not race.active().any():
            break
    return race, sum(evaluations)


def brute_force(errors, limit, target=0.01):
    """First evaluated step at which each run has an output on target, or infinity."""
    first = np.full(errors(1).shape[1:], np.inf)
    for t in racing.evaluation_steps(limit):
        hit = (errors(t) <= target).any(axis=0)
        first[hit & np.isinf(first)] = t
    return first


@pytest.mark.parametrize("seed", keep(range(8), [0, 1]))
def test_racing_matches_exhaustive_search(seed):
    errors, limit = random_curves(seed), 20_000
    race, evaluations = run_race(errors, limit)
    expected = brute_force(errors, limit)
    means = expected.mean(axis=0)
    winner = means.argmin()
    assert np.isfinite(means[winner])
    hits = race.hitting_times()
    assert hits.step.mean(axis=0).argmin() == winner
    np.testing.assert_array_equal(hits.step[:, winner], expected[:, winner])
    for r, step in enumerate(expected[:, winner]):
        best = errors(step)[:, r, winner].argmin()
        assert hits.output[r, winner] == best
    exhaustive = len(race.times) * errors(1).size
    assert evaluations < exhaustive / 3


def test_race_has_no_hitting_time_if_target_is_not_reached():
    errors = random_curves(1)
    race, _ = run_race(lambda t: errors(t) + 0.02, limit=50)
    hits = race.hitting_times()
    assert np.isinf(hits.step).all()
    assert not hits.diverged.any()
    assert race.times[-1] == 50 and (race.evaluated == len(race.times) - 1).all()


@pytest.mark.parametrize("level", [100.0, 1e9, np.inf])
def test_race_reports_divergence(level):
    race, _ = run_race(lambda t: np.full((4, 2, 3), level), limit=40)
    assert race.hitting_times().diverged.all()


def test_race_ends_once_given_score_cannot_be_beaten():
    slow, _ = run_race(random_curves(2), 20_000, best=12.0)
    assert slow.times[-1] == 12
    assert np.isinf(slow.hitting_times().step.mean(axis=0)).all()


def test_race_continues_for_step_size_whose_mean_may_still_win():
    # The first reaches ε at 100 with all seeds, the second at 10 and at 150.
    times = np.array([[[100.0, 10.0], [100.0, 150.0]]])
    race, _ = run_race(lambda t: np.where(t >= times, 0.001, 1.0), 10_000)
    step = race.hitting_times().step
    assert step[:, 1].mean() < step[:, 0].mean() < 110
    assert race.times[-1] < 200
