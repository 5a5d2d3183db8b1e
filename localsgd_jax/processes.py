"""Arrays that several processes hold: put there, read back, described."""

import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from localsgd_jax.base import PyTree


def holders(sharding: Sharding | None) -> list[int]:
    """Returns the processes that hold a part of an array, or this one alone."""
    if sharding is None or sharding.is_fully_addressable:
        return [jax.process_index()]
    return sorted({device.process_index for device in sharding.device_set})


def place(x: jax.Array | np.ndarray, sharding: Sharding) -> jax.Array:
    """Sends an array to where it belongs; each process has all of it and sends a part.

    `jax.device_put` would make the processes compare all values, by a collective.
    """
    if sharding.is_fully_addressable or not _here(x):
        return jax.device_put(x, sharding)
    if not hasattr(x, "shape"):  # A Python number, such as a count of steps.
        x = jnp.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def place_rows(
    x: jax.Array | np.ndarray, sharding: Sharding, count: int, axis: int
) -> jax.Array:
    """Sends rows to where they belong; a process has them all or only its own."""
    if sharding.is_fully_addressable or not _here(x):
        return jax.device_put(x, sharding)
    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    return jax.make_array_from_process_local_data(sharding, np.asarray(x), shape)


def own_rows(sharding: Sharding | None, count: int, axis: int = 0) -> np.ndarray:
    """Returns which of the rows along an axis this process holds, ascending."""
    rows = np.arange(count)
    if sharding is None or sharding.is_fully_addressable:
        return rows
    places = sharding.addressable_devices_indices_map((*(1,) * axis, count))
    return np.unique(np.concatenate([rows[index[axis]] for index in places.values()]))


def on_host(tree: PyTree) -> PyTree:
    """Returns NumPy arrays in every process, by a collective if one lacks a part."""
    lacking = [x for x in jax.tree.leaves(tree) if not _whole(x)]
    if lacking:
        tree = _gather(NamedSharding(lacking[0].sharding.mesh, P()))(tree)
    return jax.tree.map(np.asarray, tree)


@functools.cache
def _gather(everywhere: Sharding) -> Callable:
    """Returns the program that gives every process all.

    One and the same: a new function at each call would be compiled at each call.
    """
    return jax.jit(lambda tree: tree, out_shardings=everywhere)


def at_hand(tree: PyTree) -> PyTree:
    """Returns this process's own copy of what every process has a copy of."""

    def copy(x: jax.Array) -> jax.Array:
        if isinstance(x, Tracer) or _here(x) or not x.is_fully_replicated:
            return x
        return x.addressable_data(0)

    return jax.tree.map(copy, tree)


def local(tree: PyTree) -> bool:
    """Returns whether this process can compute with a tree on its own."""
    return all(_here(x) for x in jax.tree.leaves(tree))


def described(tree: PyTree) -> dict[str, str]:
    """Describes the leaves: type, shape, and the sum of what this process has whole."""
    return {
        jax.tree_util.keystr(path) or "the root": _description(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _description(x: PyTree) -> str:
    """Describes a leaf."""
    if not _here(x):
        return f"{x.dtype}{list(x.shape)}"
    if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    raw = np.ascontiguousarray(x)
    return f"{raw.dtype}{list(np.shape(x))} with checksum {zlib.crc32(raw):08x}"


def _here(x: object) -> bool:
    """Returns whether a leaf is on this host or on devices of this process."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _whole(x: object) -> bool:
    """Returns whether this process has all numbers of a leaf."""
    return _here(x) or x.is_fully_replicated
