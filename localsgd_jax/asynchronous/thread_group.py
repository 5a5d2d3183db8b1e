"""Thread group with error propagation and Ctrl-C handling."""

import contextlib
import queue
import threading
from collections.abc import Callable


def run_threads(
    target: Callable, count: int, start_gate: threading.Lock, stop: threading.Event
) -> list:
    """Runs and joins a group of threads; re-raises the first error.

    It is used instead of `concurrent.futures.ThreadPoolExecutor` because of Ctrl-C: a
    KeyboardInterrupt in the main thread sets `stop`, and all threads are joined before
    it propagates.

    Args:
      target: called as `target(k)` in thread k.
      count: number of threads.
      start_gate: lock that is held until all threads have been started.
      stop: event that is set on the first error, on KeyboardInterrupt, and at the end.

    Returns:
      The results in the order of k.
    """
    results = queue.SimpleQueue()

    def run(k: int) -> None:
        try:
            results.put((k, target(k), None))
        except BaseException as error:
            stop.set()
            results.put((k, None, error))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    try:
        with start_gate:
            for thread in threads:
                thread.start()
        ended = [_next_result(results) for _ in threads]
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    for _, _, error in ended:
        if error is not None:
            raise error
    return [result for _, result, _ in sorted(ended, key=lambda item: item[0])]


def _next_result(results: queue.SimpleQueue) -> tuple:
    """Returns the next result; unlike Thread.join it can always be interrupted."""
    while True:
        # A signal that arrives just before the blocking call is not handled during it,
        # so the call returns every 0.5 s.
        with contextlib.suppress(queue.Empty):
            return results.get(timeout=0.5)
