"""Thread-safe work queue and parameter server."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from localsgd_jax.asynchronous.state import AsyncState
from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check_worker_axis

History = dict[str, np.ndarray]


class WorkQueue:
    """Thread-safe queue of batches for single workers and steps.

    Attributes:
      workers: K.
      lock: held while a batch is read.
      stop: event that ends the queue early.
    """

    def __init__(self, batches: Iterable[PyTree], workers: int) -> None:
        """Stores the iterable; batches are read on demand.

        Args:
          batches: leaves `(K, B, ...)`; each batch is split into K entries.
          workers: K.
        """
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.workers = workers
        self._entries = _split_by_worker(batches, workers)

    def get(self, count: int) -> list[PyTree]:
        """Returns at most `count` batches, none at the end or after `stop`."""
        with self.lock:
            if self.stop.is_set():
                return []
            return list(itertools.islice(self._entries, count))


class ParameterServer:
    """Aggregate behind a lock, with a history of its updates.

    Attributes:
      aggregate: z.
      aggregation_state: state of the aggregation.
    """

    def __init__(self, apply: Callable, state: AsyncState, device: Any) -> None:
        """Transfers the aggregate to its device and starts the clock.

        Args:
          apply: compiled `apply(aggregate, update, aggregation_state, staleness)`.
          state: gives the aggregate and the state of the aggregation.
          device: device of the aggregate.
        """
        self._lock, self._apply, self._device = threading.Lock(), apply, device
        self.aggregate, self.aggregation_state = jax.device_put(
            (state.aggregate, state.aggregation_state), device
        )
        self._rows, self._start = [], time.perf_counter()

    def push_pull(self, update: PyTree, version: int, row: dict) -> tuple[PyTree, int]:
        """Atomically applies an update and returns the current aggregate.

        Args:
          update: xₖ − rₖ.
          version: number of updates applied when the worker last pulled.
          row: history columns of the update, to which its staleness in updates and the
            seconds since the start are added.

        Returns:
          The aggregate, and the number of updates applied so far as its version.
        """
        update = jax.device_put(update, self._device)
        with self._lock:
            staleness = len(self._rows) - version
            self.aggregate, self.aggregation_state = self._apply(
                self.aggregate, update, self.aggregation_state, np.int32(staleness)
            )
            seconds = time.perf_counter() - self._start
            self._rows.append(row | {"staleness": staleness, "seconds": seconds})
            return self.aggregate, len(self._rows)

    def history(self) -> History:
        """Returns the history as columns, in the order of the updates."""
        names = self._rows[0] if self._rows else ()
        return {name: np.array([row[name] for row in self._rows]) for name in names}


def _split_by_worker(batches: Iterable[PyTree], workers: int) -> Iterator[PyTree]:
    """Yields the rows of each batch; raises unless there are K."""
    for batch in batches:
        check_worker_axis("run(batches)", batch, workers)
        for k in range(workers):
            yield jax.tree.map(lambda leaf, k=k: leaf[k], batch)
