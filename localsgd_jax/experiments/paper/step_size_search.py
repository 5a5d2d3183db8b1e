"""Step-size search per table cell, with automatic extension of the grid."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from localsgd_jax.experiments import logistic
from localsgd_jax.experiments.datasets import Dataset
from localsgd_jax.experiments.paper import step_size_grid
from localsgd_jax.experiments.paper.racing import Race, evaluation_steps
from localsgd_jax.experiments.paper.step_sizes import step_sizes

MAX_EXTENSIONS = 3


class Cell(NamedTuple):
    """A cell of the table: target ε, b, K and H."""

    epsilon: float
    batch: int
    workers: int
    period: int


class SearchOptions(NamedTuple):
    """Options of the search.

    Attributes:
      seeds: R.
      min_exponent: smallest exponent i of the step sizes c = 2ⁱ.
      max_exponent: largest exponent.
      max_steps: largest number of steps of one worker.
    """

    seeds: int = 8
    min_exponent: int = -8
    max_exponent: int = 1
    max_steps: int = 2**20


class BestStepSize(NamedTuple):
    """The best step size of a cell; all but the status are None if ε was not reached.

    Attributes:
      status: "reached", "not reached", or "diverged" if no step size of the grid
        was better than x = 0.
      iterations: mean over seeds.
      std: standard deviation over seeds, None for a single one.
      min_iterations: minimum over seeds.
      max_iterations: maximum over seeds.
      step_size: "constant" or "decaying".
      exponent: i.
      output: the output that reached ε first for most seeds.
      first_grid: iterations without extension of the grid of step sizes.
    """

    status: str
    iterations: float | None = None
    std: float | None = None
    min_iterations: int | None = None
    max_iterations: int | None = None
    step_size: str | None = None
    exponent: int | None = None
    output: str | None = None
    first_grid: float | None = None


def canonical(cell: Cell) -> Cell:
    """Returns the cheapest cell with the same iterates.

    Workers that synchronise after every step are equivalent to one worker with batches
    of K·b examples, and the period of a single worker has no effect.

    Args:
      cell: a cell.

    Returns:
      An equivalent cell.

    Example:
      >>> canonical(Cell(0.005, batch=4, workers=8, period=1))
      Cell(epsilon=0.005, batch=32, workers=1, period=1)
    """
    if cell.period > 1 and cell.workers > 1:
        return cell
    return Cell(cell.epsilon, cell.batch * cell.workers, 1, 1)


def solver(
    options: SearchOptions, dataset: Dataset, minimum: float
) -> Callable[[Cell], BestStepSize]:
    """Returns a function that finds the best step size of a cell.

    Args:
      options: seeds, step sizes and number of steps.
      dataset: the examples.
      minimum: f*.

    Returns:
      `solve(cell)`.
    """
    examples = step_size_grid.to_device(dataset)
    errors_of = logistic.suboptimality_fn(dataset, minimum)
    origin = np.zeros((1, examples.features.shape[1]), np.float32)
    start = float(errors_of(origin)[0])

    @cache
    def simulation(workers: int, batch: int) -> step_size_grid.Simulation:
        config = step_size_grid.GridConfig(workers, batch, options.seeds)
        return step_size_grid.simulation(dataset, examples, config)

    def run_race(cell: Cell, exponents: range, best: float) -> Race:
        runs = simulation(cell.workers, cell.batch)
        sizes = step_sizes(exponents)
        shape = (len(step_size_grid.OUTPUTS), options.seeds, len(sizes.scale))
        race, state = Race(shape, cell.epsilon, start, best), runs.start(sizes)
        for t in evaluation_steps(options.max_steps):
            state = runs.advance(state, sizes, cell.period, t)
            last = t == options.max_steps
            race.evaluate(t, runs.outputs(state), errors_of, last)
            if not race.active().any():
                break
        return race

    return lambda cell: _search(lambda *window: run_race(cell, *window), options)


def _search(
    run_race: Callable[[range, float], Race], options: SearchOptions
) -> BestStepSize:
    """Extends the grid of step sizes while the best one lies on its edge."""
    window = covered = range(options.min_exponent, options.max_exponent + 1)
    best = first = _best_of(run_race(window, np.inf), window)
    for _ in range(MAX_EXTENSIONS):
        window = _next_window(covered, best.exponent, len(window))
        if window is None:
            break
        candidate = _best_of(run_race(window, _score(best)), window)
        if _score(candidate) >= _score(best):
            break
        best, covered = candidate, _union(covered, window)
    return best._replace(first_grid=first.iterations)


def _best_of(race: Race, window: range) -> BestStepSize:
    """Returns the best step size of a race."""
    hits = race.hitting_times()
    means = hits.step.mean(axis=0)
    winner = int(means.argmin())
    if not np.isfinite(means[winner]):
        return BestStepSize("diverged" if hits.diverged.all() else "not reached")
    steps = hits.step[:, winner]
    counts = np.bincount(hits.output[:, winner])
    return BestStepSize(
        status="reached",
        iterations=round(float(means[winner]), 1),
        std=round(float(steps.std(ddof=1)), 1) if len(steps) > 1 else None,
        min_iterations=int(steps.min()),
        max_iterations=int(steps.max()),
        step_size="constant" if winner < len(window) else "decaying",
        exponent=window[winner % len(window)],
        output=step_size_grid.OUTPUTS[counts.argmax()],
    )


def _next_window(covered: range, exponent: int | None, size: int) -> range | None:
    """Returns the adjacent exponents if this one lies on an edge."""
    if exponent == covered[-1]:
        return range(covered.stop, covered.stop + size)
    if exponent == covered[0]:
        return range(covered.start - size, covered.start)
    return None


def _score(best: BestStepSize) -> float:
    """Returns the iterations, infinite if ε was not reached."""
    return np.inf if best.iterations is None else best.iterations


def _union(first: range, second: range) -> range:
    """Returns the union of two adjacent ranges."""
    return range(min(first.start, second.start), max(first.stop, second.stop))
