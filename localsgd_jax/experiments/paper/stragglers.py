"""Time to ε on w8a with stragglers, asynchronous against synchronous local SGD.

Command: localsgd reproduce stragglers (7 minutes; 1 minute with --quick)
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from localsgd_jax.asynchronous import max_staleness
from localsgd_jax.experiments import datasets, devices, logistic, plotting
from localsgd_jax.experiments.paper import results, straggler_simulation
from localsgd_jax.experiments.paper.results import Finding, ResumableTable
from localsgd_jax.experiments.paper.step_size_grid import to_device
from localsgd_jax.experiments.paper.step_sizes import MAX_RATE, constant_step_sizes
from localsgd_jax.experiments.paper.straggler_simulation import (
    StragglerProblem,
    Workload,
)

NAME = "stragglers"
RANDOM = "random"
ALGORITHMS = ("synchronous", "asynchronous")
RESULT_COLUMNS = ("status", "time", "min_time", "max_time", "rate", "staleness")
Slowness = float | str


class StragglerConfig(NamedTuple):
    """Settings of the experiment.

    Attributes:
      epsilon: ε.
      workload: K, H, b and T; a run ends after T·K local steps.
      slowness: time of a step of one worker over that of the others, or "random": the
        steps of all workers take independent exponential times.
      real_slowness: the values that are also measured in real time.
      seeds: R.
      exponents: smallest and largest i of the constant step sizes 32 · 2ⁱ.
      seconds_per_unit: seconds of a step of a worker that is not slow, in real time.
    """

    epsilon: float = 0.005
    workload: Workload = Workload(workers=8, period=16, batch=4, steps=6400)
    slowness: tuple[Slowness, ...] = (1, 2, 4, 8, RANDOM)
    real_slowness: tuple[float, ...] = (1, 2, 4, 8)
    seeds: int = 3
    exponents: tuple[int, int] = (-7, -2)
    seconds_per_unit: float = 5e-4


FULL = StragglerConfig()
QUICK = FULL._replace(slowness=(1, 4, RANDOM), real_slowness=(4,), seeds=1)


class StragglerCase(NamedTuple):
    """Key of a row of the table."""

    clock: str
    slowness: Slowness
    algorithm: str


def straggler_cases(config: StragglerConfig) -> list[StragglerCase]:
    """Returns the keys of the rows, in order.

    Args:
      config: settings of the experiment.

    Returns:
      Both algorithms for each slowness, first all on the virtual clock.

    Example:
      >>> straggler_cases(StragglerConfig(slowness=(4,), real_slowness=(4,)))[1]
      StragglerCase(clock='virtual', slowness=4, algorithm='asynchronous')
    """
    return [
        StragglerCase(clock, slowness, algorithm)
        for clock, values in (
            ("virtual", config.slowness),
            ("real", config.real_slowness),
        )
        for slowness in values
        for algorithm in ALGORITHMS
    ]


def run(directory: Path, config: StragglerConfig, data: str) -> str:
    """Computes the missing rows, writes the figure and returns the findings as text.

    `data` is a name or path of `datasets.load`. Errors: as there, and as
    `ResumableTable`.
    """
    datasets.check_exists(data)
    settings = {"data": data} | config._asdict()
    columns = StragglerCase._fields + RESULT_COLUMNS
    rows = results.run_table(
        ResumableTable(directory, NAME, settings, columns),
        straggler_cases(config),
        lambda: _solver(config, data),
    )
    _plot(directory, config, rows)
    return results.write_findings(directory, NAME, _findings(config, rows))


def hitting_times(
    trajectory: straggler_simulation.Trajectory, errors_of: Callable, epsilon: float
) -> np.ndarray:
    """Returns the first time at which each run had f − f* ≤ ε.

    Args:
      trajectory: points `(R, n, S, d)`.
      errors_of: function from points `(m, d)` to f − f* `(m,)`.
      epsilon: ε.

    Returns:
      Times `(R, S)`, infinite if ε was not reached.
    """
    shape = trajectory.points.shape
    errors = errors_of(trajectory.points.reshape(-1, shape[-1]))
    reached = (errors <= epsilon).reshape(shape[:-1])
    first = trajectory.times[reached.argmax(axis=1)]
    return np.where(reached.any(axis=1), first, np.inf)


def _solver(config: StragglerConfig, data: str) -> Callable:
    """Returns `make_row(case, rows)`; real time needs the row on the virtual clock."""
    workload = config.workload
    mesh = devices.make_local_mesh(workload.workers)
    dataset = datasets.load(data)
    examples = to_device(dataset)
    errors_of = logistic.suboptimality_fn(dataset, logistic.optimal_value(dataset))
    exponents = range(config.exponents[0], config.exponents[1] + 1)

    def problem(exponents: range) -> StragglerProblem:
        sizes = constant_step_sizes(exponents)
        return StragglerProblem(dataset, examples, sizes, workload)

    def times_of(trajectory: straggler_simulation.Trajectory) -> np.ndarray:
        return hitting_times(trajectory, errors_of, config.epsilon)

    @cache
    def runners(exponent: int) -> straggler_simulation.RealTimeRunners:
        return straggler_simulation.on_local_devices(
            problem(range(exponent, exponent + 1)), config.seconds_per_unit, mesh
        )

    def virtual(case: StragglerCase) -> dict:
        costs, seeds = _costs(workload, case.slowness), config.seeds
        if case.algorithm == "synchronous":
            trajectory = straggler_simulation.run_synchronous(
                problem(exponents), costs, seeds
            )
            return _best_row(times_of(trajectory), exponents)
        trace = straggler_simulation.event_trace(workload, costs)
        trajectory = straggler_simulation.run_asynchronous(
            problem(exponents), trace, seeds
        )
        row = _best_row(times_of(trajectory), exponents)
        return row | {"staleness": int(max_staleness(trace).max())}

    def real(case: StragglerCase, rows: Sequence[dict]) -> dict:
        rate = _find_row(rows, case._replace(clock="virtual"))["rate"]
        if rate is None:
            return _best_row(np.full((1, 1), np.inf), exponents)
        exponent = round(np.log2(rate / MAX_RATE))
        runner = getattr(runners(exponent), case.algorithm)
        costs = _costs(workload, case.slowness)
        times = [times_of(runner(costs, seed))[0] for seed in range(config.seeds)]
        return _best_row(np.array(times), range(exponent, exponent + 1))

    def make_row(case: StragglerCase, rows: Sequence[dict]) -> dict:
        result = virtual(case) if case.clock == "virtual" else real(case, rows)
        return case._asdict() | result

    return make_row


def _costs(workload: Workload, slowness: Slowness) -> np.ndarray:
    """Returns the time of each step."""
    if isinstance(slowness, str):
        return straggler_simulation.random_costs(workload)
    return straggler_simulation.single_straggler_costs(workload, slowness)


def _best_row(times: np.ndarray, exponents: range) -> dict:
    """Returns the result for the step size with the smallest mean time; `(R, S)`."""
    means = times.mean(axis=0)
    best = int(means.argmin())
    row = dict.fromkeys(RESULT_COLUMNS) | {"status": "not reached"}
    if not np.isfinite(means[best]):
        return row
    of_seeds = times[:, best]
    numbers = {
        "time": means[best],
        "min_time": of_seeds.min(),
        "max_time": of_seeds.max(),
        "rate": MAX_RATE * 2.0 ** exponents[best],
    }
    rounded = {name: float(f"{value:.5g}") for name, value in numbers.items()}
    return row | {"status": "reached"} | rounded


def _find_row(rows: Sequence[dict], case: StragglerCase) -> dict:
    """Returns the row of a case."""
    fields = StragglerCase._fields
    return next(r for r in rows if StragglerCase(*(r[n] for n in fields)) == case)


def _row_pairs(rows: Sequence[dict]) -> Iterator[tuple[dict, dict]]:
    """Yields the synchronous and the asynchronous row of each clock and slowness."""
    for row in rows:
        if row["algorithm"] == "synchronous":
            case = StragglerCase(row["clock"], row["slowness"], "asynchronous")
            yield row, _find_row(rows, case)


def _findings(config: StragglerConfig, rows: Sequence[dict]) -> list[Finding]:
    """Returns the speedup of Algorithm 2 for each pair, and the theoretical one."""
    return [
        Finding(
            f"{synchronous['clock']} clock, "
            f"{_format_straggler(synchronous['slowness'])}: "
            + _theoretical_speedup(config.workload.workers, synchronous["slowness"]),
            _format_comparison(synchronous, asynchronous),
        )
        for synchronous, asynchronous in _row_pairs(rows)
    ]


def _format_straggler(slowness: Slowness) -> str:
    """Returns a description of the straggler."""
    if slowness == RANDOM:
        return "steps of random length"
    return "equal workers" if slowness == 1 else f"one worker {slowness:g} × slower"


def _theoretical_speedup(workers: int, slowness: Slowness) -> str:
    """Returns the speedup predicted from throughput alone, without loss by staleness.

    Synchronous rounds take s times as long; asynchronous workers do K − 1 + 1/s times
    the work of one worker per unit of time.
    """
    if isinstance(slowness, str):
        return "asynchronous faster, since a round takes the largest of K sums"
    ratio = slowness * (workers - 1 + 1 / slowness) / workers
    if slowness == 1:
        return "asynchronous as fast as synchronous"
    return f"asynchronous {ratio:.2f} × faster if staleness has no cost"


def _format_comparison(synchronous: dict, asynchronous: dict) -> str:
    """Returns the measured times and their ratio as text."""
    unit = "s" if synchronous["clock"] == "real" else "step times"
    times = [
        f"{name} {_format_time(row, unit)}"
        for name, row in zip(ALGORITHMS, (synchronous, asynchronous), strict=True)
    ]
    if synchronous["time"] is None or asynchronous["time"] is None:
        return ", ".join(times)
    ratio = synchronous["time"] / asynchronous["time"]
    return f"asynchronous {ratio:.2f} × faster: {', '.join(times)}"


def _format_time(row: dict, unit: str) -> str:
    """Formats the time to ε of a row."""
    return "not reached" if row["time"] is None else f"{row['time']:.4g} {unit}"


def _plot(directory: Path, config: StragglerConfig, rows: Sequence[dict]) -> None:
    """Plots bars of the time to ε for both algorithms, one panel per clock."""
    figure = plotting.new_figure(8.4, 3.4)
    widths = (len(config.slowness), len(config.real_slowness))
    panels = figure.subplots(1, 2, width_ratios=widths)
    units = {"virtual": "virtual time / time of a step", "real": "seconds"}
    for axes, (clock, unit) in zip(panels, units.items(), strict=True):
        pairs = [pair for pair in _row_pairs(rows) if pair[0]["clock"] == clock]
        for i, name in enumerate(ALGORITHMS):
            heights = [pair[i]["time"] or 0.0 for pair in pairs]
            positions = np.arange(len(pairs)) + 0.4 * i - 0.2
            color = plotting.curve_style(i, 3)["color"]
            axes.bar(positions, heights, 0.38, color=color, label=name)
        ticks = [_tick_label(synchronous["slowness"]) for synchronous, _ in pairs]
        axes.set_xticks(range(len(ticks)), ticks)
        plotting.label_axes(axes, f"{clock} clock", "slowness of one worker", unit)
    panels[0].legend(frameon=False, fontsize="small", loc="upper left")
    workload = config.workload
    figure.suptitle(
        f"Time to f − f* = {config.epsilon:g} (K = {workload.workers}, "
        f"H = {workload.period}, b = {workload.batch})"
    )
    plotting.save(figure, directory, NAME)


def _tick_label(slowness: Slowness) -> str:
    """Returns the tick label of a straggler."""
    return "random\nsteps" if isinstance(slowness, str) else f"{slowness:g} ×"
