"""Evaluation of the mean model after a round, and the bytes that it costs."""

import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.analysis import RING_BYTES_FACTOR
from localsgd_jax.analysis.device_bytes import DeviceBytes
from localsgd_jax.core.types import PyTree, State
from localsgd_jax.distributed import arrays
from localsgd_jax.distributed.coordination import broadcast_from_first
from localsgd_jax.execution.mean_model import (
    common_model,
    consensus,
    mean_over_workers,
    select_fields,
)
from localsgd_jax.training.byte_counter import BestEffort
from localsgd_jax.training.callbacks import Callbacks


class Evaluation(NamedTuple):
    """Values of an evaluation, and the bytes sent for it.

    Attributes:
      values: values of `evaluate` by name.
      bytes: sent by a worker with a link of its own, without checksums.
      device_bytes: sent by a device; None if they are not known.
    """

    values: dict[str, float]
    bytes: int
    device_bytes: float | None


class Evaluator:
    """Evaluation of the mean model.

    If all workers are equal, as after most rules, the model is the copy of each device
    and no parameters are sent. Else it is their mean, which costs an all-reduce.
    """

    def __init__(
        self, callbacks: Callbacks, processes: list[int], state: State
    ) -> None:
        """Compiles nothing.

        Args:
          callbacks: `evaluate` and its fields.
          processes: indices of the processes that hold the state.
          state: state of the cluster; only its shardings are read.
        """
        self._callbacks, self._processes = callbacks, processes
        self._device_bytes, self._best_effort = DeviceBytes(state), BestEffort()

    def evaluate(self, state: State) -> Evaluation:
        """Evaluates the mean model in the primary process and broadcasts the values.

        If no process holds all of the model, each of them takes part in the evaluation.

        Args:
          state: state after a round.

        Returns:
          The values, and the bytes sent for the mean.
        """
        fields = self._callbacks.eval_fields
        model, sent, device_sent = common_model(state, fields), 0, 0.0
        if model is None:
            model = consensus(state, fields)
            sent, device_sent = self._bytes_of_mean(state)
        processes = self._processes if arrays.is_fully_addressable(model) else []
        values = broadcast_from_first(
            "train(evaluate)", lambda: self._callbacks.run_evaluate(model), processes
        )
        return Evaluation(cast(dict[str, float], values), sent, device_sent)

    def _bytes_of_mean(self, state: State) -> tuple[int, float | None]:
        """Returns the bytes that a worker and a device send for the mean."""
        fields = select_fields(state.workers, self._callbacks.eval_fields)
        found = self._best_effort(
            self._device_bytes.bytes_per_round, mean_over_workers, fields, rounds=1
        )
        self._best_effort.warn()
        return all_reduce_bytes(fields), found.max_bytes if found else None


def all_reduce_bytes(tree: PyTree) -> int:
    """Returns the bytes that a worker sends in a ring all-reduce of its row.

        2 (K − 1)/K · b

    Args:
      tree: leaves `(K, ...)`; those with a mean are sent in float32 or wider.

    Returns:
      The bytes, rounded up.

    Example:
      >>> import jax.numpy as jnp
      >>> all_reduce_bytes({"w": jnp.zeros((4, 1000)), "step": jnp.zeros(4, int)})
      6000
    """
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    if not leaves:
        return 0
    row_bytes = sum(x.size // x.shape[0] * _mean_itemsize(x) for x in leaves)
    return math.ceil(RING_BYTES_FACTOR["all-reduce"](leaves[0].shape[0]) * row_bytes)


def _mean_itemsize(x: Any) -> int:
    """Returns the bytes of a number in the mean, which is float32 or wider."""
    return np.promote_types(x.dtype, np.float32).itemsize
