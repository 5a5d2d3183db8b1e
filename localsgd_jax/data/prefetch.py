"""Prefetching of host batches to devices.

`train` reads `max_steps_per_dispatch` batches in advance, the size of the buffer here.
"""

import collections
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import jax
import numpy as np

from localsgd_jax.core.pytrees import stack_leaves
from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import (
    check_array_leaves,
    check_worker_axis,
    describe,
)
from localsgd_jax.distributed.coordination import CoordinationError, Coordinator
from localsgd_jax.distributed.meshes import NO_MESH, ambient_mesh
from localsgd_jax.distributed.mismatches import describe_mismatches


class Prefetcher:
    """Buffer of host batches that are stacked over time and put on devices.

    Attributes:
      data_state: state of the iterator after the last batch that was removed; None
        before the first one, or without a function that reads it.
    """

    def __init__(
        self,
        batches: Iterator[PyTree],
        put: Callable,
        workers: tuple[int, int],
        read_state: Callable[[], Any] | None = None,
    ) -> None:
        """Initialises an empty buffer; reads no batch.

        Args:
          batches: iterator of batches, leaves `(K, B, ...)`.
          put: `put(batches, time=True)`, transfers leaves `(H, K, B, ...)` to devices.
          workers: K, and the number of workers of this process, which is another
            allowed number of rows.
          read_state: returns a copy of the iterator's state, called after each batch.
        """
        self._batches, self._put, self._workers = batches, put, workers
        self._read_state = read_state or (lambda: None)
        self._buffer, self._structure = collections.deque(), None
        self.data_state: Any = None

    def fill(self, buffer_size: int) -> int:
        """Reads batches until the buffer holds `buffer_size`, or they end.

        Args:
          buffer_size: number of batches to hold.

        Returns:
          The number of batches from the head on that have equal shapes and dtypes and
          can therefore be stacked; 0 if the batches have ended.

        Raises:
          ValueError: if a batch has no leaves, or a leaf no row for each worker.
          TypeError: if a batch differs from the first one in structure.
        """
        while len(self._buffer) < buffer_size:
            try:
                batch = next(self._batches)
            except StopIteration:
                break
            shapes = self._check_structure(batch)
            self._buffer.append((shapes, batch, self._read_state()))
        if not self._buffer:
            return 0
        head_shapes = self.head_shapes
        same = itertools.takewhile(lambda entry: entry[0] == head_shapes, self._buffer)
        return sum(1 for _ in same)

    def is_exhausted(self) -> bool:
        """Returns whether no batch is left; reads at most one."""
        return self.fill(buffer_size=1) == 0

    def peek(self) -> PyTree:
        """Returns the next batch without removing it; None if the buffer is empty."""
        return self._buffer[0][1] if self._buffer else None

    @property
    def head_shapes(self) -> tuple | None:
        """Shape and dtype of each leaf of the next batch; None for an empty buffer."""
        return self._buffer[0][0] if self._buffer else None

    def next_batches(self, count: int) -> PyTree:
        """Removes `count` batches; returns them on devices, leaves (H, K, B, ...)."""
        entries = [self._buffer.popleft() for _ in range(count)]
        _, batches, states = zip(*entries, strict=True)
        self.data_state = states[-1]
        # Batches may be on a mesh with other axis types than the ambient mesh.
        with ambient_mesh(NO_MESH):
            stacked = stack_leaves(*batches)
        return self._put(stacked, time=True)

    def _check_structure(self, batch: PyTree) -> tuple:
        """Returns shape and dtype of each leaf; raises if the structure differs."""
        check_array_leaves("train(batches)", "a batch", batch)
        leaves, structure = jax.tree.flatten(batch)
        if not leaves:
            text = f"a batch must hold arrays, got {describe(batch)}"
            raise ValueError(f"train(batches): {text}")
        if self._structure is None:
            self._structure = structure
        if structure != self._structure:
            raise TypeError(
                "train(batches): all batches must have one structure, got "
                f"{structure} after {self._structure}"
            )
        workers, local_workers = self._workers
        check_worker_axis("train(batches)", batch, workers, local_workers=local_workers)
        return tuple((np.shape(leaf), jax.dtypes.result_type(leaf)) for leaf in leaves)


class SynchronizedPrefetcher:
    """Prefetcher of several processes, which all end with the shortest iterator.

    Before each dispatch the processes exchange how many batches they can stack. A
    process with a full buffer whose shapes have not changed publishes nothing.
    """

    def __init__(
        self,
        batches: Iterator[PyTree],
        put: Callable,
        buffer_size: int,
        processes: Sequence[int],
        workers: tuple[int, int],
        read_state: Callable[[], Any] | None = None,
    ) -> None:
        """Initialises an empty buffer; reads no batch.

        Args:
          batches: iterator of batches, leaves `(K, B, ...)`, or with the rows of the
            workers of this process.
          put: `put(batches, time=True)`, transfers leaves `(H, K, B, ...)` to devices.
          buffer_size: number of batches to read in advance, as in all other processes.
          processes: indices of the participating processes.
          workers: as for `Prefetcher`.
          read_state: returns a copy of the state of the iterator of this process.
        """
        self._prefetcher = Prefetcher(batches, put, workers, read_state)
        self._buffer_size = buffer_size
        self._coordinator = Coordinator("train(batches)", processes)
        self._num_ready: int | None = None
        self._last_head_shapes: tuple | None = None
        self._last_description: Mapping[str, str] = {}

    def fill(self) -> int:
        """Fills the buffer; returns how many batches every process can stack.

        All processes must call it. Until batches are removed further calls return the
        same number without communication.

        Raises:
          CoordinationError: if shapes differ between processes, another process cannot
            read its batches, or one does not respond in time.
        """
        if self._num_ready is None:
            self._num_ready = self._negotiate()
        return self._num_ready

    def peek(self) -> PyTree:
        """Returns the next batch without removing it; None if the buffer is empty."""
        return self._prefetcher.peek()

    @property
    def data_state(self) -> Any:
        """State of the iterator after the last batch that was removed, or None."""
        return self._prefetcher.data_state

    def next_batches(self, count: int) -> PyTree:
        """Removes `count` batches; returns them on devices, leaves (H, K, B, ...)."""
        self._num_ready = None
        return self._prefetcher.next_batches(count)

    def _negotiate(self) -> int:
        """Returns the smallest number of stackable batches over all processes."""
        prefetcher = self._prefetcher
        try:
            num_ready = prefetcher.fill(self._buffer_size)
        except Exception as error:
            # The other processes wait for this one. If they have failed, too, the error
            # of this process is still the one to raise here.
            with suppress(CoordinationError):
                self._coordinator.all_gather(
                    {"error": f"{type(error).__name__}: {error}"}
                )
            raise
        message, head_shapes = None, prefetcher.head_shapes
        if num_ready < self._buffer_size or head_shapes != self._last_head_shapes:
            message = {
                "num_ready": num_ready,
                "shapes": _describe_shapes(prefetcher.peek()),
            }
        self._last_head_shapes = head_shapes
        messages = self._coordinator.all_gather(message)
        counts = [self._num_batches(*entry) for entry in messages.items()]
        num_ready = min([num_ready, *counts])
        if messages and num_ready:
            self._check_shapes_equal(messages)
        return num_ready

    def _num_batches(self, process: int, message: dict) -> int:
        """Returns the number of batches in a message; raises if it holds an error."""
        if "error" in message:
            raise CoordinationError(
                f"{self._coordinator.call}: process {process} raised {message['error']}"
            )
        return message["num_ready"]

    def _check_shapes_equal(self, messages: dict[int, dict]) -> None:
        """Raises if shapes differ; without a message, the last published ones count."""
        processes = self._coordinator.processes
        shapes = dict.fromkeys(processes, self._last_description)
        shapes |= {process: message["shapes"] for process, message in messages.items()}
        if mismatches := describe_mismatches(shapes):
            raise CoordinationError(
                f"{self._coordinator.call}: {'; '.join(mismatches)}"
            )
        self._last_description = shapes[processes[0]]


def _describe_shapes(batch: PyTree) -> dict[str, str]:
    """Describes the leaves of a batch, with "K" for the number of local rows."""

    def describe(leaf: jax.Array | np.ndarray) -> str:
        sizes = ", ".join(["K", *map(str, np.shape(leaf)[1:])])
        return f"{jax.dtypes.result_type(leaf)}[{sizes}]"

    return {
        jax.tree_util.keystr(path) or "the root": describe(leaf)
        for path, leaf in jax.tree.leaves_with_path(batch)
    }
