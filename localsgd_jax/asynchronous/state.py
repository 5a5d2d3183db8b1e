"""What asynchronous workers and their aggregate are between two runs."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from localsgd_jax import fields, placement
from localsgd_jax.asynchronous.aggregation import Aggregation
from localsgd_jax.base import Algorithm, PyTree


class AsyncState(NamedTuple):
    """K asynchronous workers and their aggregate.

    Attributes:
      aggregate: z, in float32 at least: small shares of progress would vanish in
        fewer bits. It is the model.
      memory: what the aggregation remembers.
      workers: each worker's training state, leaves `(K, ...)`.
      read: what each worker last read, leaves `(K, ...)`.
    """

    aggregate: PyTree
    memory: PyTree
    workers: PyTree
    read: PyTree


class Asynchronous(NamedTuple):
    """Asynchronous Local SGD at some place.

    Attributes:
      init: `init(params) -> AsyncState`; all start from `params`.
      run: `run(state, batches, ...) -> (state, report)`; when it ends all progress
        is in the aggregate, and another run may follow.
      workers: K.
    """

    init: Callable[[PyTree], AsyncState]
    run: Callable[..., tuple[AsyncState, PyTree]]
    workers: int


def start(
    algorithm: Algorithm,
    workers: int,
    aggregation: Aggregation,
    field: str,
    params: PyTree,
) -> AsyncState:
    """Gives every worker a copy of its own, and the aggregate another."""
    stacked = placement.simulate(algorithm, workers).init(params).workers
    shared = get(stacked, field)
    _check_floating(field, shared)
    aggregate = jax.tree.map(lambda x: _widen(x[0]), shared)
    # Copies, since a buffer that stands in two places cannot be donated.
    read = jax.tree.map(jnp.copy, shared)
    return AsyncState(aggregate, aggregation.init(aggregate), stacked, read)


def get(worker: PyTree, field: str) -> PyTree:
    """Returns the field that is shared."""
    return fields.read(worker, [field])[field]


def progress(params: PyTree, read: PyTree) -> PyTree:
    """Returns what was done since the last read: p = x − r, in float32 at least."""
    return jax.tree.map(lambda x, r: _widen(x) - _widen(r), params, read)


def adopt(
    worker: PyTree, field: str, aggregate: PyTree, read: PyTree
) -> tuple[PyTree, PyTree]:
    """Lets a worker go on from the aggregate, and keep a copy: x ← z, r ← z."""
    read = jax.tree.map(lambda z, r: z.astype(r.dtype), aggregate, read)
    return fields.write(worker, {field: read}), read


def _widen(x: jax.Array) -> jax.Array:
    """Casts to the dtype in which progress is accumulated."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check_floating(field: str, tree: PyTree) -> None:
    """Refuses leaves of which no share can be added."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"init(params): every leaf of {field!r} must be floating point or "
                f"complex, got {leaf.dtype} at "
                f"{jax.tree_util.keystr(path) or 'the root'}"
            )
