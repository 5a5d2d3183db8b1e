"""Search for the best step size, with extension of the grid."""

import itertools

import numpy as np

from localsgd_jax.experiments.paper import racing, step_size_search
from localsgd_jax.experiments.paper.step_size_search import (
    BestStepSize,
    SearchOptions,
)

OPTIONS = SearchOptions(min_exponent=-1, max_exponent=1)


def fake_race(table, start=100.0):
    """A race in which exponent i takes table[i] steps, constant or decaying alike."""

    def run(window, best):
        steps = np.array([[table.get(i, np.inf) for i in window] * 2])
        race = racing.Race((4, 1, 2 * len(window)), 0.01, start, best)
        race.step = np.where(steps < best, steps, np.inf)
        race.error[:] = 1.0 if table else start
        windows.append((window[0], window[-1]))
        return race

    windows = []
    return run, windows


def test_grid_is_extended_while_best_lies_on_its_edge():
    table = {-1: 90.0, 0: 80.0, 1: 70.0, 2: 60.0, 3: 50.0, 4: 40.0, 5: 45.0}
    run, windows = fake_race(table)
    best = step_size_search._search(run, OPTIONS)
    assert windows == [(-1, 1), (2, 4), (5, 7)]
    assert best == BestStepSize(
        "reached", 40.0, None, 40, 40, "constant", 4, "last", 70.0
    )
    run, windows = fake_race({-i: v for i, v in table.items()})
    best = step_size_search._search(run, OPTIONS)
    assert windows == [(-1, 1), (-4, -2), (-7, -5)]
    assert (best.exponent, best.iterations, best.first_grid) == (-4, 40.0, 70.0)


def test_grid_is_not_extended_if_best_lies_inside():
    run, windows = fake_race({-1: 90.0, 0: 60.0, 1: 70.0})
    best = step_size_search._search(run, OPTIONS)
    assert windows == [(-1, 1)]
    assert best.iterations == best.first_grid == 60.0
    run, windows = fake_race({1: 70.0, 2: 50.0, 3: 60.0})
    assert step_size_search._search(run, OPTIONS).exponent == 2
    assert windows == [(-1, 1), (2, 4)]


def test_status_without_a_hitting_time():
    run, windows = fake_race({})
    assert step_size_search._search(run, OPTIONS) == BestStepSize("diverged")
    run, _ = fake_race({9: 5.0})
    assert step_size_search._search(run, OPTIONS) == BestStepSize("not reached")
    assert windows == [(-1, 1)]


def test_best_step_size_is_identified_by_its_index():
    window = range(-3, 0)
    for index, expected in enumerate(
        itertools.product(("constant", "decaying"), window)
    ):
        race = racing.Race((4, 2, 6), 0.01, 100.0, np.inf)
        race.step[:, index] = [30, 20]
        race.output[:, index] = 2
        best = step_size_search._best_of(race, window)
        assert (best.step_size, best.exponent) == expected
        assert best[:5] == ("reached", 25.0, 7.1, 20, 30) and best.output == "linear"
