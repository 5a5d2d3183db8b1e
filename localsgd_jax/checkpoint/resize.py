"""Conversion of the stored rows of K₀ workers to K workers, on the devices."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from localsgd_jax.checkpoint.leaves import key_impl, restore_target
from localsgd_jax.core.pytrees import accumulation_dtype, is_key
from localsgd_jax.execution.layout import axis_names
from localsgd_jax.execution.replication import fold_in_workers


def stored_rows(leaf: Any, num_workers: int) -> jax.ShapeDtypeStruct:
    """Returns the target for reading the rows of K₀ workers.

    A device reads the same part of each row, so that the sum over rows needs no
    communication, and 1/W of the rows' bytes on W positions of workers. An axis of the
    mesh that divides no axis of the leaf reads complete rows.

    Args:
      leaf: leaf of the new state, `(K, ...)`.
      num_workers: K₀.

    Returns:
      Shape `(K₀, ...)` and sharding.
    """
    target = restore_target(leaf)
    shape = (num_workers, *target.shape[1:])
    sharding = target.sharding
    if isinstance(sharding, NamedSharding):
        sharding = _split_rows(sharding, shape)
    return jax.ShapeDtypeStruct(shape, target.dtype, sharding=sharding)


def resize_rows(stored: jax.Array, like: Any) -> jax.Array:
    """Converts stored rows of K₀ workers to K workers.

    Every floating leaf is the mean

        xₖ ← (1/K₀) Σⱼ xⱼ

    accumulated in float32 at least, in the order of the workers. Integer leaves are
    copied from worker 0. Worker k < K₀ keeps its PRNG keys. Each further worker k folds
    k into the keys of worker 0.

    Args:
      stored: `(K₀, ...)`, with key data in place of typed keys.
      like: leaf of K workers, an array or abstract array, which gives the sharding.

    Returns:
      The leaf of K workers.
    """
    if is_key(like):
        return _keys_program(like.shape[0], key_impl(like), like.sharding)(stored)
    program = _rows_program(like.shape[0], like.sharding)
    return program(stored, np.float32(len(stored)))


@functools.cache
def _rows_program(num_workers: int, sharding: Sharding | None) -> Callable:
    """Returns the jitted program of a leaf; cached, as `jax.jit` is by function."""

    def resize(rows: jax.Array, count: jax.Array) -> jax.Array:
        row = _common_row(rows, count)
        return jnp.broadcast_to(row, (num_workers, *row.shape))

    return jax.jit(resize, out_shardings=sharding)


@functools.cache
def _keys_program(num_workers: int, impl: Any, sharding: Sharding | None) -> Callable:
    """Returns the jitted program of a leaf of typed PRNG keys."""

    def resize(data: jax.Array) -> jax.Array:
        return _resize_keys(jax.random.wrap_key_data(data, impl=impl), num_workers)

    return jax.jit(resize, out_shardings=sharding)


def _common_row(rows: jax.Array, count: jax.Array) -> jax.Array:
    """Returns the mean row of a floating leaf, and row 0 of any other leaf.

    The rows are added one by one, so that the result is the same on every mesh. The
    count is an argument, since XLA would multiply by the reciprocal of a constant.
    """
    if not jnp.issubdtype(rows.dtype, jnp.inexact):
        return rows[0]
    dtype = accumulation_dtype(rows)
    total = jax.lax.fori_loop(
        1,
        len(rows),
        lambda k, total: total + rows[k].astype(dtype),
        rows[0].astype(dtype),
    )
    return (total / count.astype(dtype)).astype(rows.dtype)


def _resize_keys(keys: jax.Array, num_workers: int) -> jax.Array:
    """Returns the keys of existing workers, followed by derived keys of new ones."""
    indices = jnp.arange(len(keys), max(num_workers, len(keys)))
    return jnp.concatenate([keys, fold_in_workers(keys[0], indices)])[:num_workers]


def _split_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Moves the axes of the workers from the leading axis to axes that they divide."""
    sizes = sharding.mesh.shape
    entries = [tuple(axis_names(entry)) for entry in sharding.spec]
    entries += [()] * (len(shape) - len(entries))
    axes, entries[0] = entries[0], ()
    for axis in axes:
        for i in range(1, len(shape)):
            names = (*entries[i], axis)
            if shape[i] % math.prod(sizes[name] for name in names) == 0:
                entries[i] = names
                break
    return NamedSharding(sharding.mesh, P(*(names or None for names in entries)))
