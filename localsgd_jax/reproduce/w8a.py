"""Iterations to a given accuracy on w8a, and the speedup of K workers.

Command: localsgd reproduce w8a
"""

import itertools
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from localsgd_jax.experiments import datasets, logistic
from localsgd_jax.experiments.datasets import Dataset
from localsgd_jax.reproduce import w8a_report
from localsgd_jax.reproduce.output import Table
from localsgd_jax.reproduce.search import Best, Cell, Options, canonical, solver


class Block(NamedTuple):
    """A product of cells: a target ε, and all b, K and H."""

    epsilon: float
    batches: tuple[int, ...]
    workers: tuple[int, ...]
    periods: tuple[int, ...]


class Plan(NamedTuple):
    """What is run.

    Attributes:
      blocks: the cells.
      options: seeds, step sizes and limit.
    """

    blocks: tuple[Block, ...]
    options: Options = Options()


def full() -> Plan:
    """Returns the paper's experiment."""
    powers = tuple(2**i for i in range(8))
    coarse = Block(0.005, (4, 16), powers, powers[:7])
    return Plan((coarse, Block(0.0005, (4, 16), (1, 16), (1, 8, 64))))


def quick() -> Plan:
    """Returns a part of it that takes less than two minutes."""
    block = Block(0.005, (4, 16), (1, 4, 16, 64), (1, 64))
    return Plan((block,), Options(seeds=3, lowest=-6))


def cells(plan: Plan) -> list[Cell]:
    """Returns the cells in the order of the rows.

    Args:
      plan: what is run.

    Returns:
      All products, block by block.

    Example:
      >>> cells(Plan((Block(0.1, (4,), (1, 2), (8,)),)))[1]
      Cell(epsilon=0.1, batch=4, workers=2, period=8)
    """
    return [
        Cell(block.epsilon, *rest)
        for block in plan.blocks
        for rest in itertools.product(*block[1:])
    ]


def changed(
    plan: Plan,
    seeds: int | None = None,
    exponents: tuple[int, int] | None = None,
    limit: int | None = None,
) -> Plan:
    """Changes what is not None.

    Args:
      plan: to start from.
      seeds: R.
      exponents: least and largest i.
      limit: most steps of one worker.

    Returns:
      A plan.

    Raises:
      ValueError: if the exponents are not in order, or beyond float32.
    """
    old = plan.options
    lowest, highest = exponents or (old.lowest, old.highest)
    if not -60 <= lowest <= highest <= 60:
        raise ValueError(
            "--exponents must be in order and between -60 and 60, got "
            f"{lowest} {highest}"
        )
    new = Options(seeds or old.seeds, lowest, highest, limit or old.limit)
    return plan._replace(options=new)


def run(directory: Path, plan: Plan, data: str, rhos: tuple[float, ...]) -> str:
    """Runs what is missing in the table, then writes the figure and the verdict.

    Args:
      directory: where everything goes.
      plan: what to run.
      data: name or path of the data set.
      rhos: prices of communication ρ; they change no row of the table.

    Returns:
      The verdict.

    Raises:
      ValueError: if the directory holds a run with other settings, or the data set is
        not what it must be.
      OSError: if something cannot be read or written.
    """
    settings = {"data": data, "blocks": plan.blocks} | plan.options._asdict()
    table = Table(directory, "w8a", settings, Cell._fields + Best._fields)
    missing = cells(plan)[len(table.rows) :]
    if missing:
        _fill(table, missing, plan, datasets.load(data))
    return w8a_report.write(directory, table.rows, rhos, plan.options.seeds)


def _fill(table: Table, missing: list[Cell], plan: Plan, dataset: Dataset) -> None:
    """Computes the missing rows."""
    solve = solver(plan.options, dataset, logistic.minimum(dataset))
    known = {canonical(_cell(row)): _best(row) for row in table.rows}
    for cell in tqdm(missing, desc="w8a", unit="cell", disable=None):
        key = canonical(cell)
        if key not in known:
            known[key] = solve(key)
        table.append(cell._asdict() | known[key]._asdict())


def _cell(row: dict) -> Cell:
    """Returns the cell of a row."""
    return Cell(*(row[name] for name in Cell._fields))


def _best(row: dict) -> Best:
    """Returns the result in a row."""
    return Best(*(row[name] for name in Best._fields))
