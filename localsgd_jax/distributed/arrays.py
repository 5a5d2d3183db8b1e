"""Global arrays: transfer to devices, local parts, host copies and descriptions."""

import functools
import zlib
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from localsgd_jax.core.pytrees import is_traced
from localsgd_jax.core.types import PyTree


def processes_of(sharding: Sharding | None) -> list[int]:
    """Returns the processes with shards of an array; this one for local arrays."""
    if sharding is None or sharding.is_fully_addressable:
        return [jax.process_index()]
    return sorted({device.process_index for device in sharding.device_set})


def device_put_global(x: jax.Array | np.ndarray, sharding: Sharding) -> jax.Array:
    """Puts an array onto a global sharding; every process passes all of it.

    Each process transfers its own shards. `jax.device_put` would compare the values of
    all processes with a collective.
    """
    if sharding.is_fully_addressable or not _is_addressable(x):
        return jax.device_put(x, sharding)
    if not hasattr(x, "shape"):  # A Python number, such as a step count.
        x = jnp.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def device_put_rows(
    x: jax.Array | np.ndarray, sharding: Sharding, count: int, axis: int
) -> jax.Array:
    """Puts rows onto a global sharding; a process holds all rows or its local ones.

    Each process transfers the blocks of its devices, also where the sharding splits
    further axes.

    Args:
      x: rows along `axis`, either all `count` or those of `local_rows`.
      sharding: target sharding, with contiguous rows.
      count: number of rows of the global array.
      axis: axis of the rows.

    Returns:
      The global array.
    """
    if sharding.is_fully_addressable or not _is_addressable(x):
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    held = local_rows(sharding, shape, axis) if x.shape[axis] < count else range(count)
    first = {row: position for position, row in enumerate(held)}

    def block(index: Any) -> np.ndarray:
        start, stop, _ = index[axis].indices(count)
        rows = slice(first[start], first[start] + stop - start)
        return x[*index[:axis], rows, *index[axis + 1 :]]

    return jax.make_array_from_callback(shape, sharding, block)


def local_rows(
    sharding: Sharding | None, shape: tuple[int, ...], axis: int = 0
) -> np.ndarray:
    """Returns the indices of the rows on this process, in ascending order.

    Args:
      sharding: sharding of the global array, or None.
      shape: shape of the global array.
      axis: axis of the rows.

    Returns:
      Row indices; all of them for a fully addressable sharding.
    """
    rows = np.arange(shape[axis])
    if sharding is None or sharding.is_fully_addressable:
        return rows
    indices = sharding.addressable_devices_indices_map(shape)
    local = [rows[index[axis]] for index in indices.values() if index is not None]
    return np.unique(np.concatenate(local))


def to_host(tree: PyTree) -> PyTree:
    """Copies a tree to NumPy; uses a collective for arrays without a local replica."""
    incomplete = [x for x in jax.tree.leaves(tree) if not _has_all_values(x)]
    if incomplete:
        tree = _replicate_program(NamedSharding(incomplete[0].sharding.mesh, P()))(tree)
    return jax.tree.map(np.asarray, tree)


@functools.cache
def _replicate_program(replicated: Sharding) -> Callable:
    """Returns a jitted program for replicating a tree over all processes.

    The program is cached, because `jax.jit` of a new function compiles again.
    """
    return jax.jit(lambda tree: tree, out_shardings=replicated)


def local_replica(tree: PyTree) -> PyTree:
    """Returns the local copy of fully replicated arrays; other leaves are unchanged."""

    def copy(x: jax.Array) -> jax.Array:
        if is_traced(x) or _is_addressable(x) or not x.is_fully_replicated:
            return x
        return x.addressable_data(0)

    return jax.tree.map(copy, tree)


def is_fully_addressable(tree: PyTree) -> bool:
    """Returns whether this process can compute with a tree without communication."""
    return all(_is_addressable(x) for x in jax.tree.leaves(tree))


def describe_leaves(tree: PyTree) -> dict[str, str]:
    """Describes each leaf by dtype, shape and checksum.

    Global arrays have no checksum, since this process does not hold all their values.
    """
    return {
        jax.tree_util.keystr(path) or "the root": _describe_leaf(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _describe_leaf(x: PyTree) -> str:
    """Describes a leaf by dtype, shape and, if addressable, CRC-32 checksum."""
    if not _is_addressable(x):
        return f"{x.dtype}{list(x.shape)}"
    if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    raw = np.ascontiguousarray(x)
    return (
        f"{raw.dtype}{list(np.shape(x))} with checksum {zlib.crc32(cast(Any, raw)):08x}"
    )


def _is_addressable(x: object) -> bool:
    """Returns whether a leaf is on the host or fully addressable."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _has_all_values(x: PyTree) -> bool:
    """Returns whether this process holds all values of a leaf."""
    return _is_addressable(x) or x.is_fully_replicated
