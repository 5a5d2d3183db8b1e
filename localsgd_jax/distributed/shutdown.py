"""Exit of one process of a job without JAX's shutdown barrier.

`jax.distributed.shutdown`, which JAX registers with `atexit`, is a barrier over all
processes. A process that exits because of an error would block in it until the other
processes exit, too, or JAX's timeout aborts all of them.
"""

import atexit
import concurrent.futures
import os
import sys
import threading
import time
from concurrent.futures import Future
from types import TracebackType

import jax

from localsgd_jax.core import validation
from localsgd_jax.distributed._jax_internals import coordination_client, is_coordinator
from localsgd_jax.distributed.background import submit_daemon
from localsgd_jax.distributed.coordination import job_state
from localsgd_jax.distributed.environment import ProcessInfo

# Process 0 hosts the coordination service, through which the other processes receive
# their errors, so it exits last.
COORDINATOR_EXIT_DELAY_SECONDS = 2.0


def exit_process(code: int) -> None:
    """Exits a process of a job without the shutdown barrier.

    `sys.exit` would block in the shutdown barrier until JAX aborts all processes. In a
    program without other processes this call returns. It does not return in a process
    whose `initialize` has failed.

    Args:
      code: exit code, from 0 to 255.

    Raises:
      TypeError: if the code is not an int.
      ValueError: if it is out of range.
    """
    code = validation.check_int("exit_process(code)", "code", code, 0, 255)
    is_connected = jax.distributed.is_initialized()
    if not (is_connected or job_state.has_peers):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_connected and is_coordinator():
        time.sleep(COORDINATOR_EXIT_DELAY_SECONDS)
    os._exit(code)


def install_exit_handlers(
    process: ProcessInfo, recoverable: bool, timeout: float
) -> None:
    """Installs the exception hook and, for recoverable jobs, an exit barrier.

    An uncaught exception then ends its process at once.

    Args:
      process: index of this process and number of processes.
      recoverable: whether processes may fail or exit at different times. When the
        service of process 0 ends, JAX aborts all processes that still run, so process
        0 then waits for them at exit.
      timeout: seconds that process 0 waits at most.
    """
    _install_excepthook()
    if not recoverable:
        return
    exiting, peers = threading.Event(), None
    if process.process_id == 0:
        # Started now: from Python 3.12 on, no thread can start during the exit.
        processes = list(range(process.num_processes))
        peers = submit_daemon(_wait_for_peers, exiting, processes)
    atexit.register(_shutdown_after_peers, exiting, peers, timeout)


def _install_excepthook() -> None:
    """Makes an uncaught exception end the process after printing the traceback."""
    previous_hook = sys.excepthook

    def hook(
        error_type: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        previous_hook(error_type, error, trace)
        exit_process(130 if issubclass(error_type, KeyboardInterrupt) else 1)

    sys.excepthook = hook


def _wait_for_peers(exiting: threading.Event, processes: list[int]) -> None:
    """Waits for `exiting`, then for all live processes to exit as well."""
    exiting.wait()
    coordination_client().get_live_nodes(processes)


def _shutdown_after_peers(
    exiting: threading.Event, peers: Future | None, timeout: float
) -> None:
    """Shuts the job down; process 0 waits for its peers first."""
    if coordination_client() is None:  # The program has called shutdown itself.
        return
    if peers:
        exiting.set()
        concurrent.futures.wait([peers], timeout)
    jax.distributed.shutdown()
