"""The best step size for a cell of the table, on a grid that grows where it must."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from localsgd_jax.experiments.datasets import Dataset
from localsgd_jax.reproduce import grid, objective
from localsgd_jax.reproduce.race import Race, looks
from localsgd_jax.reproduce.step_sizes import step_sizes

EXTENSIONS = 3


class Cell(NamedTuple):
    """A row of the table: target ε, b, K and H."""

    epsilon: float
    batch: int
    workers: int
    period: int


class Options(NamedTuple):
    """How a cell is solved.

    Attributes:
      seeds: R.
      lowest: least exponent i of the step sizes c = 2ⁱ.
      highest: largest exponent.
      limit: most steps of one worker.
    """

    seeds: int = 8
    lowest: int = -8
    highest: int = 1
    limit: int = 2**20


class Best(NamedTuple):
    """The best step size of a cell, None where ε was not reached.

    Attributes:
      status: "reached", "not reached", or "diverged" if no step size of the grid
        did better than x = 0.
      iterations: mean over seeds.
      deviation: standard deviation over seeds, None for a single one.
      least: least over seeds.
      most: largest over seeds.
      step_size: "constant" or "decaying".
      exponent: i.
      output: the one that arrived first for most seeds.
      first_grid: iterations without extending the grid of step sizes.
    """

    status: str
    iterations: float | None = None
    deviation: float | None = None
    least: int | None = None
    most: int | None = None
    step_size: str | None = None
    exponent: int | None = None
    output: str | None = None
    first_grid: float | None = None


def canonical(cell: Cell) -> Cell:
    """Returns the cheapest cell with the same iterates.

    Workers that agree after every step are one worker with batches of K·b, and one
    worker agrees with itself at any period.

    Args:
      cell: any.

    Returns:
      A cell.

    Example:
      >>> canonical(Cell(0.005, batch=4, workers=8, period=1))
      Cell(epsilon=0.005, batch=32, workers=1, period=1)
    """
    if cell.period > 1 and cell.workers > 1:
        return cell
    return Cell(cell.epsilon, cell.batch * cell.workers, 1, 1)


def solver(
    options: Options, dataset: Dataset, minimum: float
) -> Callable[[Cell], Best]:
    """Makes the function that finds the best step size of a cell.

    Args:
      options: seeds, step sizes and limit.
      dataset: the examples.
      minimum: f*.

    Returns:
      `solve(cell)`.
    """
    examples = grid.load(dataset)
    errors_of = objective.suboptimality(dataset, minimum)
    origin = np.zeros((1, examples.features.shape[1]), np.float32)
    start = float(errors_of(origin)[0])

    @cache
    def simulation(workers: int, batch: int) -> grid.Simulation:
        shape = grid.Shape(workers, batch, options.seeds)
        return grid.simulation(dataset, examples, shape)

    def race(cell: Cell, exponents: range, best: float) -> Race:
        runs = simulation(cell.workers, cell.batch)
        sizes = step_sizes(exponents)
        shape = (len(grid.OUTPUTS), options.seeds, len(sizes.scale))
        contest, walk = Race(shape, cell.epsilon, start, best), runs.start(sizes)
        for t in looks(options.limit):
            walk = runs.advance(walk, sizes, cell.period, t)
            contest.look(t, runs.outputs(walk), errors_of, last=t == options.limit)
            if not contest.racing().any():
                break
        return contest

    return lambda cell: _search(lambda *window: race(cell, *window), options)


def _search(race: Callable[[range, float], Race], options: Options) -> Best:
    """Extends the grid of step sizes while the best one lies on its edge."""
    window = covered = range(options.lowest, options.highest + 1)
    best = first = _winner(race(window, np.inf), window)
    for _ in range(EXTENSIONS):
        window = _beyond(covered, best.exponent, len(window))
        if window is None:
            break
        found = _winner(race(window, _mean(best)), window)
        if _mean(found) >= _mean(best):
            break
        best, covered = found, _union(covered, window)
    return best._replace(first_grid=first.iterations)


def _winner(contest: Race, window: range) -> Best:
    """Reads the best step size off a race."""
    arrival = contest.arrival()
    means = arrival.step.mean(axis=0)
    winner = int(means.argmin())
    if not np.isfinite(means[winner]):
        return Best("diverged" if arrival.hopeless.all() else "not reached")
    steps = arrival.step[:, winner]
    counts = np.bincount(arrival.output[:, winner])
    return Best(
        status="reached",
        iterations=round(float(means[winner]), 1),
        deviation=round(float(steps.std(ddof=1)), 1) if len(steps) > 1 else None,
        least=int(steps.min()),
        most=int(steps.max()),
        step_size="constant" if winner < len(window) else "decaying",
        exponent=window[winner % len(window)],
        output=grid.OUTPUTS[counts.argmax()],
    )


def _beyond(covered: range, exponent: int | None, size: int) -> range | None:
    """Returns the next exponents if this one lies on an edge."""
    if exponent == covered[-1]:
        return range(covered.stop, covered.stop + size)
    if exponent == covered[0]:
        return range(covered.start - size, covered.start)
    return None


def _mean(best: Best) -> float:
    """Returns the iterations, infinite if ε was not reached."""
    return np.inf if best.iterations is None else best.iterations


def _union(one: range, other: range) -> range:
    """Joins two ranges side by side."""
    return range(min(one.start, other.start), max(one.stop, other.stop))
