"""The library beside what a user would otherwise do, on the same steps of two workers.

Two workers, H = 16, SGD within; same model, same batches, same number of steps, all
batches in place before the clock starts. Those of one algorithm must end at the same
parameters. What runs in processes of its own has two with a thread each. Aim: ahead of
each, and twice as fast as DrJAX step by step on small models.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np

from benchmarks.peers import problem as problems
from benchmarks.peers.contestants import (
    CONTESTANTS,
    FUSED,
    LOCAL,
    Contestant,
    Entrant,
    flat,
    installed,
)
from benchmarks.record import Shown
from benchmarks.timing import Times, alternate, ratio

DEVICES = (2,)
SHOWN = Shown(
    "over ours",
    ("model", "algorithm", "contestant"),
    "time / fused rounds of the library",
)
# Float32 sums in another order; an algorithm that differs is off by far more.
TOLERANCE = 1e-3


def run(devices: int, tiny: bool) -> list[dict]:
    del devices
    return [
        row
        for name in problems.NAMES
        for row in compare(problems.make(name, tiny), tiny)
    ]


def compare(
    problem: problems.Problem,
    tiny: bool,
    contestants: Sequence[Contestant] = CONTESTANTS,
) -> list[dict]:
    """Times all that are installed, in turn, after a look at where they end.

    Those given must include the library's fused rounds of local SGD.
    """
    entrants: dict[Contestant, Entrant] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        problems.save(problem, folder)
        for one in contestants:
            if all(map(installed, one.needs)):
                entrants[one] = one.enter(problem, tiny, folder)
                stack.callback(entrants[one].close)
        differs = differences(problem, entrants)
        times, _ = alternate(
            {one: entrant.turn for one, entrant in entrants.items()},
            repeats=1 if tiny else 7,
            least=0 if tiny else 0.2,
        )
    return [row(problem, one, times, differs) for one in contestants]


def differences(
    problem: problems.Problem, entrants: dict[Contestant, Entrant]
) -> dict[Contestant, float]:
    """Compares the parameters after one turn with those of the first of an algorithm.

        ‖x − y‖ / ‖y − x₀‖

    Raises:
      ValueError: if processes of a contestant disagree, or contestants do.
    """
    start = flat(jax.tree.leaves(problem.params))
    first, found = {}, {}
    for one, entrant in entrants.items():
        entrant.turn()
        ends = entrant.params()
        expected = first.setdefault(one.algorithm, ends[0])
        moved = np.linalg.norm(expected - start)
        found[one] = max(float(np.linalg.norm(x - expected) / moved) for x in ends)
        if not found[one] <= TOLERANCE:
            raise ValueError(
                f"{one.name}: {one.algorithm} must end where the first of its kind "
                f"does within {TOLERANCE}, got a difference of {found[one]:.2g}"
            )
    return found


def row(
    problem: problems.Problem,
    one: Contestant,
    times: dict[Contestant, Times],
    differs: dict[Contestant, float],
) -> dict:
    """Describes a contestant; what is not installed says so."""
    shown = {
        "model": problem.name,
        "algorithm": one.algorithm,
        "contestant": one.name,
        "with": f"{one.package} {installed(one.package) or ''}".strip(),
    }
    if one not in times:
        return shown | dict.fromkeys(
            ("us/step", "over ours", "differs"), "not installed"
        )
    return shown | {
        "us/step": 1e6 * times[one].median / problem.steps,
        "over ours": ratio(times[one], times[reference(one.algorithm, times)]),
        "differs": differs[one],
    }


def reference(algorithm: str, times: dict[Contestant, Times]) -> Contestant:
    """Returns the library's fused rounds of an algorithm; of local SGD for others."""
    fused = {one.algorithm: one for one in times if one.name == FUSED}
    return fused.get(algorithm, fused[LOCAL])
