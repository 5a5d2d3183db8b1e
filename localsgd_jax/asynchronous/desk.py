"""What threads share: the work that is left, and the aggregate."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.asynchronous.state import AsyncState
from localsgd_jax.base import PyTree

History = dict[str, np.ndarray]


class Work:
    """Batches of one worker and step, for whoever asks next."""

    def __init__(self, batches: Iterable[PyTree], workers: int) -> None:
        """Reads nothing yet."""
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.workers = workers
        self.parts = _parts(batches, workers)

    def take(self, count: int) -> list[PyTree]:
        """Returns at most that many; none at the end, or when all shall stop."""
        with self.lock:
            if self.stop.is_set():
                return []
            return list(itertools.islice(self.parts, count))


class Desk:
    """The aggregate, changed by one thread at a time."""

    def __init__(self, apply: Callable, state: AsyncState, device: Any) -> None:
        """Puts the aggregate on its device."""
        self.lock, self.apply, self.device = threading.Lock(), apply, device
        self.aggregate, self.memory = jax.device_put(
            (state.aggregate, state.memory), device
        )
        self.rows, self.began = [], time.perf_counter()

    def exchange(self, moved: PyTree, seen: int, row: dict) -> tuple[PyTree, int]:
        """Adds progress and reads, with nothing between; returns what is now there.

        `seen` and the second result count the writes that a read has seen.
        """
        moved = jax.device_put(moved, self.device)
        with self.lock:
            missed = len(self.rows) - seen
            self.aggregate, self.memory = self.apply(
                self.aggregate, moved, self.memory, np.int32(missed)
            )
            row |= {"missed": missed, "seconds": time.perf_counter() - self.began}
            self.rows.append(row)
            return self.aggregate, len(self.rows)

    def history(self) -> History:
        """Returns the rows as columns."""
        names = self.rows[0] if self.rows else ()
        return {name: np.array([row[name] for row in self.rows]) for name in names}


def stack(*leaves: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Stacks over time, on the side where the leaves are."""
    return (jnp if isinstance(leaves[0], jax.Array) else np).stack(leaves)


def _parts(batches: Iterable[PyTree], workers: int) -> Iterator[PyTree]:
    """Takes batches apart; refuses one that does not have K parts."""
    for batch in batches:
        for path, leaf in jax.tree.leaves_with_path(batch):
            if (shape := np.shape(leaf))[:1] != (workers,):
                raise ValueError(
                    "run(batches): the leading axis of every leaf must be the "
                    f"{workers} workers, got shape {shape} at "
                    f"{jax.tree_util.keystr(path) or 'the root'}"
                )
        for k in range(workers):
            yield jax.tree.map(lambda leaf, k=k: leaf[k], batch)
