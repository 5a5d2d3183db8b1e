"""Restore of a checkpoint of K₀ workers onto K workers."""

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.checkpoint.leaves import key_data, wrap_keys
from localsgd_jax.core.pytrees import accumulation_dtype
from localsgd_jax.core.types import State
from localsgd_jax.distributed.arrays import device_put_global
from localsgd_jax.execution.replication import fold_in_workers, is_key


def host_targets(state: State, num_workers: int) -> State:
    """Returns host arrays with the shapes of a checkpoint of K₀ workers.

    Args:
      state: state of K workers.
      num_workers: K₀.

    Returns:
      The state with zeros, which occupy no memory, as restore targets.
    """

    def zeros(leaf: jax.Array) -> np.ndarray:
        data = key_data(leaf)
        return np.broadcast_to(np.zeros((), data.dtype), data.shape)

    def stored_rows(leaf: jax.Array) -> np.ndarray:
        data = key_data(leaf)
        shape = (num_workers, *data.shape[1:])
        return np.broadcast_to(np.zeros((), data.dtype), shape)

    return jax.tree.map(zeros, state)._replace(
        workers=jax.tree.map(stored_rows, state.workers),
        local=jax.tree.map(stored_rows, state.local),
    )


def resize_workers(stored: State, state: State) -> State:
    """Converts a stored state of K₀ workers to K workers.

    Shared state and counters are kept. Every floating leaf of the workers is the mean

        xₖ ← (1/K₀) Σⱼ xⱼ

    accumulated in float32 at least. Integer leaves are copied from worker 0. Worker
    k < K₀ keeps its PRNG keys. Each further worker k folds k into the keys of worker 0.

    Args:
      stored: host arrays of K₀ workers, with key data in place of typed keys.
      state: state of K workers, which gives the shardings.

    Returns:
      State of K workers.
    """

    def keep(leaf: np.ndarray, like: jax.Array) -> jax.Array:
        return device_put_global(wrap_keys(leaf, like), like.sharding)

    def resize_leaf(leaf: np.ndarray, like: jax.Array) -> jax.Array:
        if is_key(like):
            rows = _resize_keys(wrap_keys(leaf, like), len(like))
        else:
            rows = np.broadcast_to(_common_row(leaf), like.shape)
        return device_put_global(rows, like.sharding)

    return jax.tree.map(keep, stored, state)._replace(
        workers=jax.tree.map(resize_leaf, stored.workers, state.workers),
        local=jax.tree.map(resize_leaf, stored.local, state.local),
    )


def _common_row(leaf: np.ndarray) -> np.ndarray:
    """Returns the mean row of a floating leaf, and row 0 of any other leaf."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf[0]
    return leaf.mean(0, dtype=accumulation_dtype(leaf)).astype(leaf.dtype)


def _resize_keys(keys: jax.Array, num_workers: int) -> jax.Array:
    """Returns the keys of existing workers, followed by derived keys of new ones."""
    indices = jnp.arange(len(keys), max(num_workers, len(keys)))
    return jnp.concatenate([keys, fold_in_workers(keys[0], indices)])[:num_workers]
