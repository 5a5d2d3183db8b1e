"""Batches on their way to the devices."""

import collections
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

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


def _stack(*leaves: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Stacks over time, on the side where the leaves are."""
    return (jnp if isinstance(leaves[0], jax.Array) else np).stack(leaves)
