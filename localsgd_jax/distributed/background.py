"""Background execution of calls in daemon threads."""

import atexit
import ctypes
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Ends a process whose finalization blocks after `_block_aborting_threads`.
MAX_FINALIZATION_SECONDS = 300
_lock = threading.Lock()
_unfinished: set[Future] = set()


def submit_daemon(call: Callable, *args: Any) -> Future:
    """Runs a call in a daemon thread and returns a Future.

    Neither Ctrl-C nor the exit of the interpreter waits for a daemon thread. A
    collective blocks indefinitely if another process has failed;
    `.result(timeout)` bounds the wait for it.

    Args:
      call: function to run.
      *args: its positional arguments.

    Returns:
      A `concurrent.futures.Future` with the result or the exception of the call.

    Example:
      >>> submit_daemon(sum, [1, 2]).result(timeout=10)
      3
    """
    future, enable_x64 = Future(), jnp.result_type(float) == np.float64
    with _lock:
        _unfinished.add(future)
    future.add_done_callback(_discard)

    def run() -> None:
        try:
            # jax.enable_x64 is thread-local, so the caller's setting is repeated here.
            with jax.enable_x64(enable_x64):
                future.set_result(call(*args))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def _discard(future: Future) -> None:
    """Removes a finished call from the unfinished ones."""
    with _lock:
        _unfinished.discard(future)


@atexit.register
def _block_aborting_threads() -> None:
    """Prevents an abandoned call from aborting the process during its exit.

    A thread that leaves a call into C++ while the interpreter finalizes is ended by
    Python before 3.14 with `pthread_exit`, which unwinds the frames of JAX. Those are
    `noexcept`, so the C++ runtime calls `abort` ("exception not rethrown"), and the
    process ends with SIGABRT instead of its exit code. A call returns at this moment if
    it waits for a process that exits at the same time. The handler of SIGABRT is
    therefore replaced by the C function `pause`, which blocks the aborting thread
    while the main thread completes the exit.
    """
    if not _unfinished or os.name != "posix":
        return
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.pause, ctypes.c_void_p))
    signal.alarm(MAX_FINALIZATION_SECONDS)
