"""Batches on their way to the devices."""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.agreement import JobError, Turns, differences
from localsgd_jax.base import PyTree


class Queue:
    """Batches read ahead, stacked over time and sent to the devices."""

    def __init__(self, batches: Iterator, put: Callable, ahead: int) -> None:
        """Reads nothing yet."""
        self.batches, self.put, self.ahead = batches, put, ahead
        self.held, self.first = collections.deque(), None

    def ready(self) -> int:
        """Reads ahead; returns how many batches from the front can be stacked."""
        while len(self.held) < self.ahead:
            try:
                batch = next(self.batches)
            except StopIteration:
                break
            self.held.append((self._shapes(batch), batch))
        if not self.held:
            return 0
        front = self.held[0][0]
        return sum(1 for _ in itertools.takewhile(lambda x: x[0] == front, self.held))

    def pop(self, count: int) -> PyTree:
        """Returns the next batches on the devices, leaves (H, K, B, ...)."""
        taken = [self.held.popleft()[1] for _ in range(count)]
        return self.put(jax.tree.map(_stack, *taken), time=True)

    def _shapes(self, batch: PyTree) -> tuple:
        """Returns what stacked leaves must share; refuses another structure."""
        leaves, structure = jax.tree.flatten(batch)
        if not leaves:
            raise ValueError(f"train(batches): a batch must hold arrays, got {batch!r}")
        if self.first is None:
            self.first = structure
        if structure != self.first:
            raise TypeError(
                "train(batches): all batches must have one structure, got "
                f"{structure} after {self.first}"
            )
        return tuple((np.shape(leaf), jax.dtypes.result_type(leaf)) for leaf in leaves)


class Convoy:
    """The queues of several processes, all of which go as far as the shortest."""

    def __init__(
        self, batches: Iterator, put: Callable, ahead: int, processes: Sequence[int]
    ) -> None:
        """Reads nothing yet."""
        self.queue = Queue(batches, put, ahead)
        self.turns = Turns("train(batches)", processes)
        self.count, self.front, self.agreed = None, None, {}

    def ready(self) -> int:
        """Reads ahead; returns how many batches can be stacked in every process.

        Raises:
          JobError: if shapes differ between processes, or another one's data fail.
        """
        if self.count is None:
            self.count = self._ask()
        return self.count

    def first(self) -> PyTree:
        """Returns the batch at the front, or None."""
        return self.queue.held[0][1] if self.queue.held else None

    def pop(self, count: int) -> PyTree:
        """Returns the next batches on the devices, leaves (H, K, B, ...)."""
        self.count = None
        return self.queue.pop(count)

    def _ask(self) -> int:
        """Waits for all; who can stack fewer than usual, or others, says so."""
        try:
            ready = self.queue.ready()
        except Exception as error:
            # The others must hear it, unless they have failed, too.
            with suppress(JobError):
                self.turns.take({"error": f"{type(error).__name__}: {error}"})
            raise
        front, word = self.queue.held[0][0] if ready else None, None
        if ready < self.queue.ahead or front != self.front:
            word = {"ready": ready, "shapes": _described(self.first())}
        said, self.front = self.turns.take(word), front
        ready = min([ready, *(self._count(*item) for item in said.items())])
        if said and ready:
            self._compare(said)
        return ready

    def _count(self, process: int, word: dict) -> int:
        """Returns how many batches a process has; raises if its data have failed."""
        if "error" in word:
            raise JobError(
                f"{self.turns.call}: process {process} has failed: {word['error']}"
            )
        return word["ready"]

    def _compare(self, said: dict[int, dict]) -> None:
        """Refuses batches of different shapes; who says nothing has those of before."""
        shapes = dict.fromkeys(self.turns.everyone, self.agreed)
        shapes |= {process: word["shapes"] for process, word in said.items()}
        if found := differences(shapes):
            raise JobError(f"{self.turns.call}: {'; '.join(found)}")
        self.agreed = shapes[self.turns.everyone[0]]


def _described(batch: PyTree) -> dict[str, str]:
    """Describes the leaves of a batch, of which a process may have some rows only."""
    return {
        jax.tree_util.keystr(path) or "the root": (
            f"{jax.dtypes.result_type(leaf)}{['K', *np.shape(leaf)[1:]]}".replace(
                "'", ""
            )
        )
        for path, leaf in jax.tree.leaves_with_path(batch)
    }


def _stack(*leaves: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Stacks over time, on the side where the leaves are."""
    return (jnp if isinstance(leaves[0], jax.Array) else np).stack(leaves)
