"""Baselines of the comparison and their requirements."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import localsgd_jax as lsgd
from benchmarks.baselines import jax_baselines
from benchmarks.baselines.problem import WORKERS, Problem
from benchmarks.baselines.worker_processes import WorkerProcesses

LIBRARY, FUSED = "localsgd-jax", "fused rounds"
LOCAL, DILOCO, EVERY_STEP = "local SGD", "DiLoCo", "every step"
TORCH_SCRIPT = str(Path(__file__).parent / "torch_worker.py")


class RunningBaseline(NamedTuple):
    """A baseline that is set up.

    Attributes:
      step: runs T steps, continuing from the last call.
      params: returns the parameters of each process, one vector each.
      close: frees its resources.
    """

    step: Callable
    params: Callable
    close: Callable


class Baseline(NamedTuple):
    """An implementation of an algorithm.

    Attributes:
      algorithm: baselines of one algorithm end at the same parameters.
      name: name in the table.
      package: package that it uses.
      requires: packages that must be installed.
      setup: `setup(problem, tiny, folder) -> RunningBaseline`.
    """

    algorithm: str
    name: str
    package: str
    requires: tuple[str, ...]
    setup: Callable


def in_process(
    make: Callable, problem: Problem, tiny: bool, folder: Path
) -> RunningBaseline:
    """Sets up a baseline in this process."""
    del tiny, folder
    step, params = make(problem)
    return RunningBaseline(
        step, lambda: [flat(jax.tree.leaves(params()))], lambda: None
    )


def multi_process(command: Sequence[str]) -> RunningBaseline:
    """Sets up a baseline in two processes."""
    workers = WorkerProcesses(command, WORKERS)
    return RunningBaseline(
        workers.step, lambda: [*map(flat, workers.params())], workers.close
    )


def library_command(rule: str, problem: Problem, tiny: bool) -> list[str]:
    """Returns the command of a process of the library."""
    command = ["-m", "benchmarks.baselines.library_worker", "--rule", rule]
    return [*command, "--model", problem.name, *(["--tiny"] if tiny else [])]


def torch_command(peer: str, problem: Problem, folder: Path | str) -> list[str]:
    """Returns the command of a process of a PyTorch baseline."""
    command = [TORCH_SCRIPT, "--peer", peer, "--model", problem.name]
    sizes = ["--period", str(problem.period), "--rate", str(problem.rate)]
    return [*command, "--folder", str(folder), *sizes]


def library_processes(
    rule: str, problem: Problem, tiny: bool, folder: Path
) -> RunningBaseline:
    """Sets up the library in two processes."""
    del folder
    return multi_process(library_command(rule, problem, tiny))


def torch_processes(
    peer: str, problem: Problem, tiny: bool, folder: Path
) -> RunningBaseline:
    """Sets up a PyTorch baseline in two processes."""
    del tiny
    return multi_process(torch_command(peer, problem, folder))


def flat(leaves: Sequence) -> np.ndarray:
    """Returns leaves as one vector."""
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


def library_baseline(algorithm: str, name: str, make: Callable) -> Baseline:
    return Baseline(algorithm, name, LIBRARY, (), partial(in_process, make))


def _library_baselines(algorithm: str, rule: Callable, name: str) -> list[Baseline]:
    """Returns the variants of the library; the first is the reference."""
    return [
        library_baseline(algorithm, FUSED, lambda p: jax_baselines.fused(p, rule())),
        library_baseline(
            algorithm, "gated steps", lambda p: jax_baselines.gated(p, rule())
        ),
        Baseline(
            algorithm, "two processes", LIBRARY, (), partial(library_processes, name)
        ),
    ]


def _torch_baseline(algorithm: str, peer: str, package: str) -> Baseline:
    requires = ("torch", package)
    return Baseline(algorithm, peer, package, requires, partial(torch_processes, peer))


def _drjax_baseline(name: str, make: Callable) -> Baseline:
    return Baseline(DILOCO, name, "drjax", ("drjax",), partial(in_process, make))


BASELINES = (
    *_library_baselines(LOCAL, lsgd.average, "average"),
    _torch_baseline(LOCAL, "PostLocalSGDOptimizer", "torch"),
    _torch_baseline(LOCAL, "accelerate LocalSGD", "accelerate"),
    _torch_baseline(LOCAL, "torchft LocalSGD", "torchft"),
    *_library_baselines(DILOCO, lsgd.diloco, "diloco"),
    _drjax_baseline("DrJAX, step by step", jax_baselines.drjax_steps),
    _drjax_baseline("DrJAX, jitted rounds", jax_baselines.drjax_rounds),
    _torch_baseline(DILOCO, "torchft DiLoCo", "torchft"),
    library_baseline(
        EVERY_STEP,
        "gated, H = 1",
        lambda p: jax_baselines.gated(p, lsgd.average(), 1),
    ),
    Baseline(
        EVERY_STEP,
        "data-parallel loop",
        "jax",
        (),
        partial(in_process, jax_baselines.data_parallel),
    ),
)


def installed(package: str) -> str | None:
    """Returns the version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
