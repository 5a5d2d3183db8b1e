"""Background execution of calls in daemon threads."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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

    def run() -> None:
        try:
            # jax.enable_x64 is thread-local, so the caller's setting is repeated here.
            with jax.enable_x64(enable_x64):
                future.set_result(call(*args))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
