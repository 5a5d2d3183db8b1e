"""State of asynchronous workers and the aggregate."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from localsgd_jax.asynchronous.aggregation import Aggregation
from localsgd_jax.core import train_state
from localsgd_jax.core.pytrees import promote
from localsgd_jax.core.types import Algorithm, PyTree
from localsgd_jax.execution import placement


class AsyncState(NamedTuple):
    """State of K asynchronous workers and the aggregate.

    Attributes:
      aggregate: z, the model. Its dtype is at least float32, since 1/K of an update
        may be lost to rounding in a narrower one.
      aggregation_state: state of the aggregation.
      workers: train state of each worker, leaves `(K, ...)`.
      last_read: parameters that each worker last pulled, leaves `(K, ...)`.
    """

    aggregate: PyTree
    aggregation_state: PyTree
    workers: PyTree
    last_read: PyTree


class AsyncCluster(NamedTuple):
    """Functions of K asynchronous workers, from `simulate` or `on_threads`.

    Attributes:
      init: `init(params) -> AsyncState`; every worker starts from `params`.
      run: `run(state, batches, ...) -> (state, metrics)`. All updates have been applied
        to the aggregate when it returns, so a run can be continued by another. The
        arguments and metrics are described in `simulate` and `on_threads`.
      num_workers: K.
    """

    init: Callable[[PyTree], AsyncState]
    run: Callable[..., tuple[AsyncState, PyTree]]
    num_workers: int


def init_state(
    algorithm: Algorithm,
    workers: int,
    aggregation: Aggregation,
    field: str,
    params: PyTree,
) -> AsyncState:
    """Initialises the aggregate and K workers with copies of it.

    Args:
      algorithm: per-worker algorithm.
      workers: K.
      aggregation: its state is initialised from the aggregate.
      field: field of the train state that is shared.
      params: parameters, or the train state of one worker.

    Returns:
      The state before the first step.

    Raises:
      TypeError: if a leaf of the field is neither floating point nor complex.
      ValueError: if the train state has no such field.
    """
    stacked = placement.simulate(algorithm, workers).init(params).workers
    shared = get_shared_field(stacked, field)
    _check_inexact(field, shared)
    aggregate = promote(jax.tree.map(lambda x: x[0], shared))
    # The leaves are copied, since a buffer that occurs twice cannot be donated.
    last_read = jax.tree.map(jnp.copy, shared)
    return AsyncState(aggregate, aggregation.init(aggregate), stacked, last_read)


def get_shared_field(worker: PyTree, field: str) -> PyTree:
    """Returns the shared field of a train state."""
    return train_state.get_fields(worker, [field])[field]


def compute_update(params: PyTree, last_read: PyTree) -> PyTree:
    """Returns the update of a worker since its last pull.

        p = x − r

    It is computed in float32 or wider.
    """
    return jax.tree.map(jnp.subtract, promote(params), promote(last_read))


def pull(
    worker: PyTree, field: str, aggregate: PyTree, last_read: PyTree
) -> tuple[PyTree, PyTree]:
    """Replaces the parameters of a worker by the aggregate.

        x ← z,   r ← z

    Args:
      worker: train state of one worker.
      field: field of the train state that is shared.
      aggregate: z.
      last_read: r; gives the dtypes.

    Returns:
      The new train state and the new r.
    """
    last_read = jax.tree.map(lambda z, r: z.astype(r.dtype), aggregate, last_read)
    return train_state.replace_fields(worker, {field: last_read}), last_read


def _check_inexact(field: str, tree: PyTree) -> None:
    """Raises a TypeError if a leaf is neither floating point nor complex."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"init(params): every leaf of {field!r} must be floating point or "
                f"complex, got {leaf.dtype} at "
                f"{jax.tree_util.keystr(path) or 'the root'}"
            )
