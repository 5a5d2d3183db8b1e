"""Time of the library over that of other implementations, on the same steps.

Two workers, H = 16, SGD as inner optimizer; all baselines have the same model, batches
and number of steps, and all batches are loaded before the clock starts. Baselines of
one algorithm must end at the same parameters. Multi-process baselines have two
processes with one thread each. Target: faster than each, and twice as fast as DrJAX
step by step on small models.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np

from benchmarks.baselines import problem as problems
from benchmarks.baselines.registry import (
    BASELINES,
    FUSED,
    LOCAL,
    Baseline,
    RunningBaseline,
    flat,
    installed,
)
from benchmarks.reporting import FigureSpec
from benchmarks.timing import Times, ratio, time_interleaved

DEVICES = (2,)
FIGURE = FigureSpec(
    "over library",
    ("model", "algorithm", "baseline"),
    "time / fused rounds of the library",
)
# For float32 sums in another order; another algorithm differs by far more.
TOLERANCE = 1e-3


def run(devices: int, tiny: bool) -> list[dict]:
    del devices
    return [
        row
        for name in problems.NAMES
        for row in run_comparison(problems.make(name, tiny), tiny)
    ]


def run_comparison(
    problem: problems.Problem,
    tiny: bool,
    baselines: Sequence[Baseline] = BASELINES,
) -> list[dict]:
    """Times all installed baselines, interleaved, after a check of their results.

    The baselines must include the library's fused rounds of local SGD.
    """
    running: dict[Baseline, RunningBaseline] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        problems.save(problem, folder)
        for baseline in baselines:
            if all(map(installed, baseline.requires)):
                running[baseline] = baseline.setup(problem, tiny, folder)
                stack.callback(running[baseline].close)
        differences = check_params(problem, running)
        times, _ = time_interleaved(
            {baseline: one.step for baseline, one in running.items()},
            repeats=1 if tiny else 7,
            min_seconds=0 if tiny else 0.2,
        )
    return [make_row(problem, baseline, times, differences) for baseline in baselines]


def check_params(
    problem: problems.Problem, running: dict[Baseline, RunningBaseline]
) -> dict[Baseline, float]:
    """Returns the relative difference to the first baseline of the same algorithm.

        ‖x − y‖ / ‖y − x₀‖

    Raises:
      ValueError: if a difference is above the tolerance.
    """
    start = flat(jax.tree.leaves(problem.params))
    references, differences = {}, {}
    for baseline, one in running.items():
        one.step()
        ends = one.params()
        expected = references.setdefault(baseline.algorithm, ends[0])
        distance = np.linalg.norm(expected - start)
        difference = max(float(np.linalg.norm(x - expected) / distance) for x in ends)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{baseline.name}: parameters must be those of the first baseline of "
                f"{baseline.algorithm} within {TOLERANCE}, got a difference of "
                f"{difference:.2g}"
            )
        differences[baseline] = difference
    return differences


def make_row(
    problem: problems.Problem,
    baseline: Baseline,
    times: dict[Baseline, Times],
    differences: dict[Baseline, float],
) -> dict:
    """Returns the row of a baseline."""
    row = {
        "model": problem.name,
        "algorithm": baseline.algorithm,
        "baseline": baseline.name,
        "with": f"{baseline.package} {installed(baseline.package) or ''}".strip(),
    }
    results = ("us/step", "over library", "difference")
    if baseline not in times:
        return row | dict.fromkeys(results, "not installed")
    reference = times[reference_of(baseline.algorithm, times)]
    values = (
        1e6 * times[baseline].median / problem.steps,
        ratio(times[baseline], reference),
        differences[baseline],
    )
    return row | dict(zip(results, values, strict=True))


def reference_of(algorithm: str, times: dict[Baseline, Times]) -> Baseline:
    """Returns the library's fused rounds of an algorithm, by default of local SGD."""
    fused = {one.algorithm: one for one in times if one.name == FUSED}
    return fused.get(algorithm, fused[LOCAL])
