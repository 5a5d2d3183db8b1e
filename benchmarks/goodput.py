"""Goodput of lockstep, elastic and decoupled training under failures of chips.

Command: python -m benchmarks goodput --out DIRECTORY (2 minutes)
Expected: with 1.2 million chips that fail once a year each, about 27 % in lockstep,
58 % elastic, and 88 to 93 % with 8 and 16 decoupled learners.

The goodput is the share of all chips times time that computes steps that count.
Failures of chips are a Poisson process. A pause that is interrupted by a failure starts
again.

    lockstep    a failure pauses all chips for the time of a restart
    elastic     a failure removes a slice until it is repaired; its removal and its
                return pause all chips for the time of a reconfiguration
    decoupled   the same for the chips of one learner; the others continue
    replaced    a failure pauses the chips of one learner for the time of a restart, as
                in `decoupled.run`; its steps since the last contribution are lost

A second table compares the last row with `decoupled.simulate`, in which learners and
syncers compute and wait for each other.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from benchmarks.reporting import format_table
from localsgd_jax import decoupled
from localsgd_jax.experiments import plotting
from localsgd_jax.experiments.paper.results import write_rows

YEAR = 365 * 86400.0


class Setting(NamedTuple):
    """Chips, their failures and the times of recovery, in seconds.

    Attributes:
      chips: number of chips.
      chip_mtbf: mean time between failures of one chip.
      restart: pause until a program runs again on all its chips.
      reconfiguration: pause until it runs with a slice more or less.
      slice_chips: chips of a slice.
      repair: time from the failure of a slice to its return.
      lost_steps: mean seconds of steps that a replaced learner has not contributed.
    """

    chips: int = 1_200_000
    chip_mtbf: float = YEAR
    restart: float = 35.0
    reconfiguration: float = 7.0
    slice_chips: int = 256
    repair: float = 3600.0
    lost_steps: float = 0.5


def paused_share(times: np.ndarray, pause: float, horizon: float) -> float:
    """Returns the share of time in pauses that start at given times.

        Σᵢ min(tᵢ₊₁ − tᵢ, pause) / horizon

    Args:
      times: starts of the pauses, ascending; a later one replaces an earlier one.
      pause: length of a pause.
      horizon: end of the simulation.
    """
    gaps = np.diff(np.append(times, horizon))
    return float(np.minimum(gaps, pause).sum()) / horizon


def failure_times(
    rng: np.random.Generator, chips: float, setting: Setting, horizon: float
) -> np.ndarray:
    """Draws the times of failures of a number of chips."""
    count = rng.poisson(horizon * chips / setting.chip_mtbf)
    return np.sort(rng.uniform(0, horizon, count))


def restarting(rng, chips: float, setting: Setting, horizon: float) -> float:
    """Returns the goodput of chips that all restart after a failure."""
    times = failure_times(rng, chips, setting, horizon)
    return 1 - paused_share(times, setting.restart, horizon)


def elastic(rng, chips: float, setting: Setting, horizon: float) -> float:
    """Returns the goodput of chips that go on without a slice that has failed."""
    # Slices that failed before the start are still being repaired.
    end = horizon + setting.repair
    failures = failure_times(rng, chips, setting, end) - setting.repair
    returns = failures + setting.repair
    changes = np.sort(np.concatenate([failures, returns]))
    changes = changes[(changes >= 0) & (changes < horizon)]
    paused = paused_share(changes, setting.reconfiguration, horizon)
    down = np.clip(returns, 0, horizon) - np.clip(failures, 0, horizon)
    missing = down.sum() / horizon * setting.slice_chips / chips
    return (1 - paused) * max(0.0, 1 - missing)


def replaced(rng, chips: float, setting: Setting, horizon: float) -> float:
    """Returns the goodput of a learner that starts again after a failure."""
    pause = setting.restart + setting.lost_steps
    return restarting(rng, chips, setting._replace(restart=pause), horizon)


def of_learners(function: Callable, learners: int) -> Callable:
    """Returns the mean goodput of learners with an equal share of the chips."""

    def goodput(rng, chips: float, setting: Setting, horizon: float) -> float:
        share = chips / learners
        values = [function(rng, share, setting, horizon) for _ in range(learners)]
        return float(np.mean(values))

    return goodput


METHODS = {
    "lockstep": restarting,
    "elastic": elastic,
    "8 decoupled learners": of_learners(elastic, 8),
    "16 decoupled learners": of_learners(elastic, 16),
    "16 learners, replaced": of_learners(replaced, 16),
    "256 learners, replaced": of_learners(replaced, 256),
    "4096 learners, replaced": of_learners(replaced, 4096),
}
PUBLISHED = {
    "lockstep": 0.27,
    "elastic": 0.58,
    "8 decoupled learners": 0.88,
    "16 decoupled learners": 0.93,
}
CHIP_MTBFS = [YEAR * 2.0**k for k in range(-3, 5)]
PAUSE_FACTORS = [2.0**k for k in range(-3, 4)]


def measure(horizon: float, seed: int = 0) -> list[dict]:
    """Returns the goodput of each method over failure rates and recovery times."""
    rng = np.random.default_rng(seed)
    settings = [("MTBF", Setting(chip_mtbf=mtbf)) for mtbf in CHIP_MTBFS]
    base = Setting()
    settings += [
        (
            "recovery",
            base._replace(
                restart=factor * base.restart,
                reconfiguration=factor * base.reconfiguration,
                repair=factor * base.repair,
            ),
        )
        for factor in PAUSE_FACTORS
    ]
    return [
        {"varied": varied, "method": name}
        | {"goodput": round(method(rng, setting.chips, setting, horizon), 4)}
        | setting._asdict()
        for varied, setting in settings
        for name, method in METHODS.items()
    ]


def clock_goodput(learners: int, quorum: int | None, rounds: int, seed: int) -> dict:
    """Runs a job with failing learners on the virtual clock.

    A step takes a second, and a learner contributes every 24 steps. Its failures are
    Poisson; its replacement joins after the time of a restart.

    Args:
      learners: number of learners.
      quorum: learners of a merge; None for `immediate()`.
      rounds: contributions of a learner without failures.
      seed: of the failures.

    Returns:
      Goodput on the clock and of `replaced`, for the same failure rate.
    """
    period, setting = 24, Setting(lost_steps=12.0)
    merge = decoupled.quorum(quorum, 2.0) if quorum else decoupled.immediate()
    algorithm = lsgd.local_sgd(
        lambda w, batch: ((w["w"] - batch) ** 2).mean(),
        optax.sgd(0.1),
        rule=lsgd.average(),
    )
    job = decoupled.Job(
        algorithm,
        {"w": jnp.zeros(())},
        lambda learner, start: itertools.repeat(np.ones((1, 1), np.float32)),
        every=period,
        steps=rounds * period * learners,
        merge=merge,
    )
    rng, share = np.random.default_rng(seed), setting.chips / learners
    horizon = 4.0 * rounds * period
    failures = [
        decoupled.Failure(learner, time, recovery=setting.restart)
        for learner in range(learners)
        for time in separate(failure_times(rng, share, setting, horizon), setting)
    ]
    clock = decoupled.Clock(learners, failures=failures)
    _, history = decoupled.simulate(job, clock)
    # The last learners of a finite job have no work while others finish.
    end = int(np.searchsorted(history["steps"], 0.9 * job.steps))
    ideal = history["seconds"][end] * learners
    expected = of_learners(replaced, learners)
    return {
        "learners": learners,
        "merge": merge.name,
        "merges": len(history["merge"]),
        "failed rounds": int(history["reissued"][-1]),
        "goodput on the clock": round(float(history["steps"][end] / ideal), 3),
        "goodput of the model": round(expected(rng, setting.chips, setting, 1e6), 3),
    }


def rounds_of(learners: int) -> int:
    """Returns the contributions of a learner on the virtual clock."""
    return max(8, min(40, 5120 // learners))


def separate(times: np.ndarray, setting: Setting) -> list[float]:
    """Returns failures of a learner that runs at that time."""
    kept: list[float] = []
    for time in times:
        if not kept or time > kept[-1] + setting.restart:
            kept.append(float(time))
    return kept


def plot(rows: Sequence[dict], directory: Path) -> None:
    """Plots goodput over failure rates and over recovery times."""
    figure = plotting.new_figure(9.5, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    titles = {
        "MTBF": ("1.2 million chips", "years between failures of a chip"),
        "recovery": (
            "a failure per chip and year",
            "recovery times over the guessed ones",
        ),
    }
    for axes, varied in zip(panels, titles, strict=True):
        for index, name in enumerate(METHODS):
            selected = [r for r in rows if (r["varied"], r["method"]) == (varied, name)]
            x = [
                r["chip_mtbf"] / YEAR
                if varied == "MTBF"
                else r["restart"] / Setting().restart
                for r in selected
            ]
            style = plotting.curve_style(index, len(METHODS))
            axes.plot(x, [r["goodput"] for r in selected], label=name, **style)
        values = list(PUBLISHED.values())
        axes.plot([1] * len(values), values, "k_", markersize=16, label="published")
        plotting.label_axes(axes, titles[varied][0], titles[varied][1], "goodput")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(0, 1)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    plotting.save(figure, directory, "goodput")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks goodput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--days", type=float, default=2.0, help="simulated time")
    parser.add_argument("--clock", type=int, nargs="+", default=[8, 16, 128, 1024])
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = measure(86400 * options.days)
    write_rows(options.out / "goodput.csv", rows)
    plot(rows, options.out)
    base = [r for r in rows if r["varied"] == "MTBF" and r["chip_mtbf"] == YEAR]
    at_setting = {row["method"]: row["goodput"] for row in base}
    print(
        format_table(
            [
                {"method": name, "goodput": value, "published": PUBLISHED.get(name)}
                for name, value in at_setting.items()
            ]
        )
    )
    on_clock = [
        clock_goodput(learners, quorum, rounds_of(learners), seed=0)
        for learners in options.clock
        for quorum in (None, *([learners // 2] if learners <= 16 else []))
    ]
    write_rows(options.out / "goodput_clock.csv", on_clock)
    print(format_table(on_clock))


if __name__ == "__main__":
    main()
