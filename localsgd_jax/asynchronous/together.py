"""Threads that start together and end together, whatever happens."""

import contextlib
import queue
import threading
from collections.abc import Callable


def together(
    live: Callable, count: int, gate: threading.Lock, stop: threading.Event
) -> list:
    """Calls `live(k)` in a thread for each k < count; returns all results in order.

    If one fails, or Ctrl-C is pressed, `stop` is set; when all have ended the error
    is raised. The gate is held until all have started.
    """
    ends = queue.SimpleQueue()

    def run(k: int) -> None:
        try:
            ends.put((k, live(k), None))
        except BaseException as error:
            stop.set()
            ends.put((k, None, error))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    try:
        with gate:
            for thread in threads:
                thread.start()
        ended = [_wait(ends) for _ in threads]
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    for _, _, error in ended:
        if error is not None:
            raise error
    return [end for _, end, _ in sorted(ended, key=lambda end: end[0])]


def _wait(ends: queue.SimpleQueue) -> tuple:
    """Returns the next end; unlike Thread.join it survives Ctrl-C at any point."""
    while True:
        # A signal just before a wait is not seen during it: wake up to look.
        with contextlib.suppress(queue.Empty):
            return ends.get(timeout=0.5)
