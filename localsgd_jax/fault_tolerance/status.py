"""State machine of a process of a fault-tolerant run."""

import enum
import signal
from collections.abc import Sequence

from localsgd_jax.fault_tolerance.report import RoundReport

EXIT_PREEMPTED = 128 + signal.SIGTERM
EXIT_TOO_FEW_PROCESSES = 75


class Status(enum.Enum):
    """Status after a synchronisation.

    All processes derive it from the same reports, so they leave RUNNING together,
    except that LEAVING holds for one process only.
    """

    RUNNING = "takes another round"
    DONE = "a process has no further steps; all synchronise what they have and end"
    PREEMPTED = "process 0 has received SIGTERM; as DONE, with exit code 143"
    TOO_FEW = "fewer than `min_processes` are left; as DONE, with exit code 75"
    LEAVING = "this process has received SIGTERM; it ends with 143, the others continue"

    @property
    def exit_code(self) -> int:
        """Exit code of the process; 0 after a complete run."""
        if self in (Status.PREEMPTED, Status.LEAVING):
            return EXIT_PREEMPTED
        return EXIT_TOO_FEW_PROCESSES if self is Status.TOO_FEW else 0


def stopping_processes(live: Sequence[int], reports: RoundReport) -> list[int]:
    """Returns the processes that have received SIGTERM.

    Args:
      live: indices of the processes of the reports.
      reports: of all live processes.

    Returns:
      Process indices.
    """
    pairs = zip(live, reports.stop_requested, strict=True)
    return [process for process, stop_requested in pairs if stop_requested]


def next_status(
    live: Sequence[int], reports: RoundReport, process_index: int, min_processes: int
) -> Status:
    """Returns the status of a running process after a synchronisation.

    Args:
      live: indices of the processes of the reports, ascending.
      reports: of all live processes.
      process_index: index of this process.
      min_processes: number of processes below which the run ends.

    Returns:
      The status.

    Example:
      >>> import numpy as np
      >>> done, stop = np.array([0, 1]), np.array([0, 0])
      >>> reports = RoundReport(np.array([4, 2]), np.array([1.0, 1.0]), done, stop, {})
      >>> next_status([0, 2], reports, process_index=2, min_processes=1).name
      'DONE'
    """
    stopping = stopping_processes(live, reports)
    if live[0] in stopping:
        return Status.PREEMPTED
    if process_index in stopping:
        return Status.LEAVING
    if len(live) - len(stopping) < min_processes:
        return Status.TOO_FEW
    return Status.DONE if any(reports.is_done) else Status.RUNNING
