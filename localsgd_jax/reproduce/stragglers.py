"""Time to ε on w8a with stragglers: asynchronous against synchronous Local SGD.

Command: localsgd reproduce async (7 minutes; 1 minute with --quick)
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from localsgd_jax.asynchronous import staleness
from localsgd_jax.experiments import datasets, devices, logistic
from localsgd_jax.reproduce import clocks, figures, grid, objective, output
from localsgd_jax.reproduce.output import Table, Verdict
from localsgd_jax.reproduce.step_sizes import LARGEST_RATE, StepSizes, step_sizes

NAME = "async"
RANDOM = "random"
ALGORITHMS = ("synchronous", "asynchronous")
COLUMNS = (
    "clock",
    "slowness",
    "algorithm",
    "status",
    "time",
    "least",
    "most",
    "rate",
    "staleness",
)
Slowness = float | str


class Plan(NamedTuple):
    """What is run.

    Attributes:
      epsilon: ε.
      race: K, H, b and T; T times K local steps are the limit.
      slowness: how many times slower one worker is, or "random": every step of every
        worker lasts an independent exponential time.
      real: those of them that also run on the real clock.
      seeds: R.
      exponents: least and largest i of the constant step sizes 32 · 2ⁱ.
      unit: seconds of a step of a worker that is not slow, on the real clock.
    """

    epsilon: float = 0.005
    race: clocks.Race = clocks.Race(workers=8, period=16, batch=4, steps=6400)
    slowness: tuple[Slowness, ...] = (1, 2, 4, 8, RANDOM)
    real: tuple[float, ...] = (1, 2, 4, 8)
    seeds: int = 3
    exponents: tuple[int, int] = (-7, -2)
    unit: float = 5e-4


def full() -> Plan:
    """Returns the experiment."""
    return Plan()


def quick() -> Plan:
    """Returns a part of it."""
    return Plan(slowness=(1, 4, RANDOM), real=(4,), seeds=1)


class Job(NamedTuple):
    """A row of the table."""

    clock: str
    slowness: Slowness
    algorithm: str


def jobs(plan: Plan) -> list[Job]:
    """Returns the rows in their order.

    Args:
      plan: what is run.

    Returns:
      Both algorithms for each slowness, first all on the virtual clock.

    Example:
      >>> jobs(Plan(slowness=(4,), real=(4,)))[1]
      Job(clock='virtual', slowness=4, algorithm='asynchronous')
    """
    return [
        Job(clock, slowness, algorithm)
        for clock, every in (("virtual", plan.slowness), ("real", plan.real))
        for slowness in every
        for algorithm in ALGORITHMS
    ]


def run(directory: Path, plan: Plan, data: str) -> str:
    """Runs what is missing in the table, then writes the figure and the verdict.

    Args:
      directory: where everything goes.
      plan: what to run.
      data: name or path of the data set.

    Returns:
      The verdict.

    Raises:
      ValueError: if the directory holds a run with other settings, or the data set is
        not what it must be.
      OSError: if something cannot be read or written.
    """
    settings = {"data": data} | plan._asdict()
    table = Table(directory, NAME, settings, COLUMNS)
    missing = jobs(plan)[len(table.rows) :]
    if missing:
        mesh = devices.worker_mesh(plan.race.workers)
        dataset = datasets.load(data)
        problem = clocks.Problem(dataset, grid.load(dataset))
        errors = objective.suboptimality(dataset, logistic.minimum(dataset))
        solve = _solver(plan, problem, mesh, errors)
        for job in tqdm(missing, desc=NAME, unit="row", disable=None):
            table.append(job._asdict() | solve(job, table.rows))
    _draw(directory, plan, table.rows)
    return output.write_verdicts(directory, NAME, _verdicts(plan, table.rows))


def arrivals(path: clocks.Path, errors_of: Callable, epsilon: float) -> np.ndarray:
    """Returns when each run was first seen with f − f* ≤ ε.

    Args:
      path: points `(R, n, S, d)`.
      errors_of: from points `(m, d)` to f − f* `(m,)`.
      epsilon: ε.

    Returns:
      Times `(R, S)`, infinite where that never happened.
    """
    points = path.points.reshape(-1, path.points.shape[-1])
    reached = (errors_of(points) <= epsilon).reshape(path.points.shape[:-1])
    first = path.times[reached.argmax(axis=1)]
    return np.where(reached.any(axis=1), first, np.inf)


def _solver(
    plan: Plan, problem: clocks.Problem, mesh: Mesh, errors_of: Callable
) -> Callable:
    """Makes `solve(job, rows)`; a job on the real clock needs the virtual row."""
    exponents = range(plan.exponents[0], plan.exponents[1] + 1)

    @cache
    def hosts(exponent: int) -> clocks.Hosts:
        sizes = _constant(range(exponent, exponent + 1))
        return clocks.hosts(problem, sizes, plan.race, plan.unit, mesh)

    def virtual(job: Job) -> dict:
        costs, sizes = _costs(plan.race, job.slowness), _constant(exponents)
        if job.algorithm == "synchronous":
            path = clocks.synchronous(problem, sizes, plan.race, costs, plan.seeds)
            return _row(arrivals(path, errors_of, plan.epsilon), exponents)
        order = clocks.events(plan.race, costs)
        path = clocks.free(problem, sizes, plan.race, order, plan.seeds)
        row = _row(arrivals(path, errors_of, plan.epsilon), exponents)
        return row | {"staleness": int(staleness(order).max())}

    def real(job: Job, rows: Sequence[dict]) -> dict:
        rate = _find(rows, job._replace(clock="virtual"))["rate"]
        if rate is None:
            return _row(np.full((1, 1), np.inf), exponents)
        exponent = round(np.log2(rate / LARGEST_RATE))
        go = getattr(
            hosts(exponent),
            "synchronous" if job.algorithm == "synchronous" else "free",
        )
        costs = _costs(plan.race, job.slowness)
        paths = [go(costs, seed) for seed in range(plan.seeds)]
        times = [arrivals(path, errors_of, plan.epsilon)[0] for path in paths]
        return _row(np.array(times), range(exponent, exponent + 1))

    def solve(job: Job, rows: Sequence[dict]) -> dict:
        return virtual(job) if job.clock == "virtual" else real(job, rows)

    return solve


def _constant(exponents: range) -> StepSizes:
    """Returns the constant step sizes alone."""
    return jax.tree.map(lambda x: x[: len(exponents)], step_sizes(exponents))


def _costs(race: clocks.Race, slowness: Slowness) -> np.ndarray:
    """Returns the time of each step."""
    if isinstance(slowness, str):
        return clocks.random_costs(race)
    return clocks.slow_one(race, slowness)


def _row(times: np.ndarray, exponents: range) -> dict:
    """Takes the step size with the least mean time over its seeds, (R, S)."""
    means = times.mean(axis=0)
    best = int(means.argmin())
    row = dict.fromkeys(COLUMNS[3:]) | {"status": "not reached"}
    if not np.isfinite(means[best]):
        return row
    mine = times[:, best]
    rate = LARGEST_RATE * 2.0 ** exponents[best]
    named = {"time": means[best], "least": mine.min(), "most": mine.max(), "rate": rate}
    digits = {name: float(f"{value:.5g}") for name, value in named.items()}
    return row | {"status": "reached"} | digits


def _find(rows: Sequence[dict], job: Job) -> dict:
    """Returns the row of a job."""
    return next(row for row in rows if Job(*(row[n] for n in Job._fields)) == job)


def _pairs(rows: Sequence[dict]) -> Iterator[tuple[dict, dict]]:
    """Yields the rows of both algorithms."""
    for row in rows:
        if row["algorithm"] == "synchronous":
            job = Job(row["clock"], row["slowness"], "asynchronous")
            yield row, _find(rows, job)


def _verdicts(plan: Plan, rows: Sequence[dict]) -> list[Verdict]:
    """Says how much sooner Algorithm 2 is there, and what the model promises."""
    return [
        Verdict(
            f"{waits['clock']} clock, {_described(waits['slowness'])}: "
            f"{_promise(plan.race.workers, waits['slowness'])}",
            _compared(waits, goes),
        )
        for waits, goes in _pairs(rows)
    ]


def _described(slowness: Slowness) -> str:
    """Names the straggler."""
    if slowness == RANDOM:
        return "steps of random length"
    return "equal workers" if slowness == 1 else f"one worker {slowness:g} × slower"


def _promise(workers: int, slowness: Slowness) -> str:
    """Says what follows from work alone, if staleness costs nothing.

    Synchronous rounds take s times as long; free workers do K − 1 + 1/s shares of
    work at a time.
    """
    if isinstance(slowness, str):
        return "asynchronous sooner, since a round waits for the worst of K sums"
    ratio = slowness * (workers - 1 + 1 / slowness) / workers
    if slowness == 1:
        return "asynchronous as soon as synchronous"
    return f"asynchronous {ratio:.2f} × sooner if stale progress counts in full"


def _compared(waits: dict, goes: dict) -> str:
    """Says what came out."""
    unit = "s" if waits["clock"] == "real" else "steps' time"
    times = [
        f"{name} {_time(row, unit)}"
        for name, row in zip(ALGORITHMS, (waits, goes), strict=True)
    ]
    if waits["time"] is None or goes["time"] is None:
        return ", ".join(times)
    return f"{waits['time'] / goes['time']:.2f} × sooner: {', '.join(times)}"


def _time(row: dict, unit: str) -> str:
    """Writes a time to ε."""
    return "not reached" if row["time"] is None else f"{row['time']:.4g} {unit}"


def _draw(directory: Path, plan: Plan, rows: Sequence[dict]) -> None:
    """Draws bars of time to ε for both algorithms, a panel for each clock."""
    figure = figures.new(8.4, 3.4)
    panels = figure.subplots(1, 2, width_ratios=(len(plan.slowness), len(plan.real)))
    units = {"virtual": "virtual time / time of a step", "real": "seconds"}
    for axes, (clock, unit) in zip(panels, units.items(), strict=True):
        pairs = [pair for pair in _pairs(rows) if pair[0]["clock"] == clock]
        for i, name in enumerate(ALGORITHMS):
            mine = [pair[i] for pair in pairs]
            places = np.arange(len(mine)) + 0.4 * i - 0.2
            heights = [row["time"] or 0.0 for row in mine]
            look = {"color": figures.style(i, 3)["color"], "label": name}
            axes.bar(places, heights, 0.38, **look)
        ticks = [_tick(waits["slowness"]) for waits, _ in pairs]
        axes.set_xticks(range(len(ticks)), ticks)
        figures.finish(axes, f"{clock} clock", "slowness of one worker", unit)
    panels[0].legend(frameon=False, fontsize="small", loc="upper left")
    race = plan.race
    figure.suptitle(
        f"Time to f − f* = {plan.epsilon:g} (K = {race.workers}, H = {race.period}, "
        f"b = {race.batch})"
    )
    figures.save(figure, directory, NAME)


def _tick(slowness: Slowness) -> str:
    """Labels a straggler."""
    return "random\nsteps" if isinstance(slowness, str) else f"{slowness:g} ×"
