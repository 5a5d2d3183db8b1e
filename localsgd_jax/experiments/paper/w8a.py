"""Iterations to a given accuracy on w8a, and the speedup of K workers.

Command: localsgd reproduce w8a (11 minutes; 2 minutes with --quick)
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from localsgd_jax.experiments import datasets, logistic
from localsgd_jax.experiments.paper import results, w8a_report
from localsgd_jax.experiments.paper.results import ResumableTable
from localsgd_jax.experiments.paper.step_size_search import (
    BestStepSize,
    Cell,
    SearchOptions,
    canonical,
    solver,
)

NAME = "w8a"
_MAX_ABS_EXPONENT = 60  # 2^60 and its products with gradients are finite in float32.
_POWERS_OF_TWO = tuple(2**i for i in range(8))


class CellGrid(NamedTuple):
    """A product of cells: one target ε with all b, K and H."""

    epsilon: float
    batches: tuple[int, ...]
    workers: tuple[int, ...]
    periods: tuple[int, ...]


class W8aConfig(NamedTuple):
    """Settings of the experiment.

    Attributes:
      grids: the cells.
      options: options of the step-size search.
    """

    grids: tuple[CellGrid, ...]
    options: SearchOptions = SearchOptions()


FULL = W8aConfig(
    (
        CellGrid(0.005, (4, 16), _POWERS_OF_TWO, _POWERS_OF_TWO[:7]),
        CellGrid(0.0005, (4, 16), (1, 16), (1, 8, 64)),
    )
)
QUICK = W8aConfig(
    (CellGrid(0.005, (4, 16), (1, 4, 16, 64), (1, 64)),),
    SearchOptions(seeds=3, min_exponent=-6),
)


def cells(config: W8aConfig) -> list[Cell]:
    """Returns the cells in the order of the rows.

    Args:
      config: settings of the experiment.

    Returns:
      All cells, grid by grid.

    Example:
      >>> cells(W8aConfig((CellGrid(0.1, (4,), (1, 2), (8,)),)))[1]
      Cell(epsilon=0.1, batch=4, workers=2, period=8)
    """
    return [
        Cell(grid.epsilon, *rest)
        for grid in config.grids
        for rest in itertools.product(*grid[1:])
    ]


def with_overrides(
    config: W8aConfig,
    seeds: int | None = None,
    exponents: tuple[int, int] | None = None,
    max_steps: int | None = None,
) -> W8aConfig:
    """Returns the settings with other search options where they are not None.

    Args:
      config: the settings.
      seeds: R.
      exponents: smallest and largest i.
      max_steps: largest number of steps of one worker.

    Returns:
      The new settings.

    Raises:
      ValueError: if the exponents are not in order, or out of range for float32.
    """
    old = config.options
    low, high = exponents or (old.min_exponent, old.max_exponent)
    if not -_MAX_ABS_EXPONENT <= low <= high <= _MAX_ABS_EXPONENT:
        raise ValueError(
            f"--exponents must be in order and between -{_MAX_ABS_EXPONENT} and "
            f"{_MAX_ABS_EXPONENT}, got {low} {high}"
        )
    options = SearchOptions(seeds or old.seeds, low, high, max_steps or old.max_steps)
    return config._replace(options=options)


def run(directory: Path, config: W8aConfig, data: str, rhos: tuple[float, ...]) -> str:
    """Computes the missing rows, writes the figure and returns the findings as text.

    `data` is a name or path of `datasets.load`. The communication costs ρ change no row
    of the table. Errors as `datasets.load` and `ResumableTable`.
    """
    datasets.check_exists(data)
    settings = {"data": data, "grids": config.grids} | config.options._asdict()
    columns = Cell._fields + BestStepSize._fields
    table = ResumableTable(directory, NAME, settings, columns)
    rows = results.run_table(
        table, cells(config), lambda: _prepare(config, data, table.rows), unit="cell"
    )
    return w8a_report.write(directory, rows, rhos, config.options.seeds)


def _prepare(config: W8aConfig, data: str, rows: Sequence[dict]) -> Callable:
    """Returns `make_row(cell, rows)`, which solves equivalent cells once."""
    dataset = datasets.load(data)
    solve = solver(config.options, dataset, logistic.optimal_value(dataset))
    solved = {
        canonical(Cell(*(row[name] for name in Cell._fields))): BestStepSize(
            *(row[name] for name in BestStepSize._fields)
        )
        for row in rows
    }

    def make_row(cell: Cell, rows: Sequence[dict]) -> dict:
        del rows
        key = canonical(cell)
        if key not in solved:
            solved[key] = solve(key)
        return cell._asdict() | solved[key]._asdict()

    return make_row
