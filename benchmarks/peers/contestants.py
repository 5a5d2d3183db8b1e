"""Who takes part, and what each needs to be installed."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import localsgd_jax as lsgd
from benchmarks.peers import in_jax
from benchmarks.peers.crew import Crew
from benchmarks.peers.problem import WORKERS, Problem

OURS, FUSED = "localsgd-jax", "fused rounds"
LOCAL, DILOCO, EACH = "local SGD", "DiLoCo", "every step"
SCRIPT = str(Path(__file__).parent / "torch_worker.py")


class Entrant(NamedTuple):
    """Ready to take turns.

    Attributes:
      turn: T steps from where the last turn ended.
      params: those of each process, as one vector each.
      close: frees what it holds.
    """

    turn: Callable
    params: Callable
    close: Callable


class Contestant(NamedTuple):
    """A way to train.

    Attributes:
      algorithm: those of one algorithm end at the same parameters.
      name: in the table.
      package: what it is made with.
      needs: packages that must be installed.
      enter: from the problem, whether it is tiny, and a folder, to an Entrant.
    """

    algorithm: str
    name: str
    package: str
    needs: tuple[str, ...]
    enter: Callable


def here(make: Callable, problem: Problem, tiny: bool, folder: Path) -> Entrant:
    """Enters someone of this process."""
    del tiny, folder
    turn, look = make(problem)
    return Entrant(turn, lambda: [flat(jax.tree.leaves(look()))], lambda: None)


def crewed(command: Sequence[str]) -> Entrant:
    """Enters someone with two processes of its own."""
    crew = Crew(command, WORKERS)
    return Entrant(crew.turn, lambda: [*map(flat, crew.params())], crew.close)


def two_processes(rule: str, problem: Problem, tiny: bool, folder: Path) -> Entrant:
    del folder
    command = ["-m", "benchmarks.peers.library_worker", "--rule", rule]
    size = ["--tiny"] if tiny else []
    return crewed([*command, "--model", problem.name, *size])


def in_torch(peer: str, problem: Problem, tiny: bool, folder: Path) -> Entrant:
    del tiny
    given = ["--model", problem.name, "--folder", str(folder)]
    sizes = ["--period", str(problem.period), "--rate", str(problem.rate)]
    return crewed([SCRIPT, "--peer", peer, *given, *sizes])


def flat(leaves: Sequence) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


def ours(algorithm: str, name: str, make: Callable) -> Contestant:
    return Contestant(algorithm, name, OURS, (), partial(here, make))


def _rounds(algorithm: str, rule: Callable, name: str) -> list[Contestant]:
    """The library's three ways; the first is what others are compared with."""
    return [
        ours(algorithm, FUSED, lambda p: in_jax.fused(p, rule())),
        ours(algorithm, "gated steps", lambda p: in_jax.gated(p, rule())),
        Contestant(algorithm, "two processes", OURS, (), partial(two_processes, name)),
    ]


def _peer(algorithm: str, peer: str, package: str) -> Contestant:
    needs = ("torch", package)
    return Contestant(algorithm, peer, package, needs, partial(in_torch, peer))


def _drjax(name: str, make: Callable) -> Contestant:
    return Contestant(DILOCO, name, "drjax", ("drjax",), partial(here, make))


CONTESTANTS = (
    *_rounds(LOCAL, lsgd.average, "average"),
    _peer(LOCAL, "PostLocalSGDOptimizer", "torch"),
    _peer(LOCAL, "accelerate LocalSGD", "accelerate"),
    _peer(LOCAL, "torchft LocalSGD", "torchft"),
    *_rounds(DILOCO, lsgd.diloco, "diloco"),
    _drjax("DrJAX, step by step", in_jax.drjax_steps),
    _drjax("DrJAX, jitted rounds", in_jax.drjax_rounds),
    _peer(DILOCO, "torchft DiLoCo", "torchft"),
    ours(EACH, "gated, H = 1", lambda p: in_jax.gated(p, lsgd.average(), 1)),
    Contestant(
        EACH, "data-parallel loop", "jax", (), partial(here, in_jax.data_parallel)
    ),
)


def installed(package: str) -> str | None:
    """Returns the version of a package, if it is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
