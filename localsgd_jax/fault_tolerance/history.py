"""Columns of the history that only fault-tolerant training has."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from localsgd_jax.core.types import State
from localsgd_jax.execution.process_local import ProcessCluster
from localsgd_jax.fault_tolerance.report import RoundReport
from localsgd_jax.training.history import HistoryRecorder

SCALAR_COLUMNS = ("live_processes", "straggler", "sync_seconds")
PER_PROCESS_COLUMNS = ("compute_seconds", "wait_seconds", "steps")


def entry_shapes(num_processes: int) -> dict[str, tuple[int, ...]]:
    """Returns the columns of a run with the shape of an entry.

    Args:
      num_processes: number of processes at the start of the run.

    Returns:
      Shapes by name: `()` for a scalar, else an entry per process.

    Example:
      >>> entry_shapes(3)["steps"], entry_shapes(3)["straggler"]
      ((3,), ())
    """
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(SCALAR_COLUMNS, ())
    return shapes | dict.fromkeys(PER_PROCESS_COLUMNS, (num_processes,))


def round_columns(
    processes: Sequence[int],
    live: Sequence[int],
    process_index: int,
    reports: RoundReport,
    seconds: float,
) -> dict[str, Any]:
    """Returns the columns of a round.

    Args:
      processes: indices of all processes at the start of the run.
      live: indices of the processes of the reports.
      process_index: index of this process.
      reports: of all live processes.
      seconds: from the end of the round in this process to the end of the
        synchronisation.

    Returns:
      Values by name; those of a process that is not live are NaN. A metric is the mean
      over local steps, so processes are weighted by their steps.
    """
    steps, compute_seconds = reports.steps, reports.compute_seconds
    wait_seconds = compute_seconds.max() - compute_seconds

    def per_process(values: np.ndarray) -> list[float]:
        by_process = dict(zip(live, values.tolist(), strict=True))
        return [by_process.get(process, math.nan) for process in processes]

    columns = {
        "live_processes": len(live),
        "straggler": live[int(compute_seconds.argmax())],
        "sync_seconds": seconds - float(wait_seconds[live.index(process_index)]),
        "compute_seconds": per_process(compute_seconds),
        "wait_seconds": per_process(wait_seconds),
        "steps": per_process(steps),
    }
    for name, values in reports.metrics.items():
        total = steps @ np.where(steps > 0, values, 0)
        columns[name] = float(total / steps.sum())
    return columns


def check_finite(
    history: HistoryRecorder,
    cluster: ProcessCluster,
    live: Sequence[int],
    reports: RoundReport,
    step: int,
    loss: float,
    state: State,
) -> None:
    """Raises in all processes if the mean loss of one of them is not finite.

    Args:
      history: rounds before this one.
      cluster: worker indices of the processes.
      live: indices of the processes of the reports.
      reports: of all live processes.
      step: local steps at the end of the round.
      loss: mean loss of the round over all processes.
      state: state after the synchronisation.

    Raises:
      NonFiniteLossError: names all workers of the processes concerned, because a
        process reports the mean over its workers.
    """
    if math.isfinite(loss):
        return
    by_process = dict(zip(live, reports.metrics["loss"], strict=True))
    losses = [by_process.get(process, 0.0) for process in cluster.worker_process]
    raise history.non_finite_loss(step, np.array(losses), state)
