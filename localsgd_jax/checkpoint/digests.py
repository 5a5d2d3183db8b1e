"""Digests of checkpoints, independent of the layout of the leaves.

The digest of an array is the pair of sums

    aⱼ = Σᵢ hⱼ(wᵢ, i) mod 2³²,  j = 1, 2

over its 32-bit words wᵢ with their positions i. Addition of integers commutes, so the
digest does not depend on the sharding: each device sums over its own shard without
communication, and the host adds the sums of the shards. For a fixed i both functions
hⱼ(·, i) are permutations: every change within a single word is detected. Any other
damage passes with probability 2⁻⁶⁴ if the hⱼ are random functions.
"""

import functools
import hashlib
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from localsgd_jax.distributed.arrays import to_host
from localsgd_jax.execution.layout import axis_names
from localsgd_jax.execution.shard_mapping import map_shards

# Finalisers of 32-bit hash functions: multipliers and shifts of MurmurHash3
# (A. Appleby, 2011) and of lowbias32 (C. Wellons, 2018).
MIXERS = (
    ((0x85EBCA6B, 0xC2B2AE35), (16, 13, 16)),
    ((0x21F0AAAD, 0x735A2D97), (16, 15, 15)),
)
# Multipliers of the low and the high half of a position. The determinant of the matrix
# is odd, so different positions have different pairs of keys.
POSITION_MULTIPLIERS = ((0x9E3779B1, 0x27D4EB2E), (0x85EBCA77, 0xC2B2AE3D))
# Number of elements that the low half of a position counts.
LOW_HALF = 2**32


def leaf_digests(
    leaves: Sequence[jax.Array], has_rows: Sequence[bool]
) -> list[list[str]]:
    """Returns the digests of arrays, computed where their shards are.

    Args:
      leaves: arrays without typed PRNG keys; all processes pass the same ones.
      has_rows: for each array whether its leading axis is the worker axis.

    Returns:
      For each array one digest per worker, or a single one; 16 hexadecimal digits.
    """
    partial_sums = [
        _digest_program(leaf.sharding, leaf.shape, rows)(leaf)
        for leaf, rows in zip(leaves, has_rows, strict=True)
    ]
    sums = [_sum_shards(sums) for sums in to_host(partial_sums)]
    return [[f"{a:08x}{b:08x}" for a, b in pairs] for pairs in sums]


def json_digest(values: Mapping[str, Any]) -> str:
    """Returns the SHA-256 digest of JSON-compatible values."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _digest_program(
    sharding: Sharding, shape: tuple[int, ...], has_rows: bool
) -> Callable[[jax.Array], jax.Array]:
    """Returns the jitted program of an array: the sums of each row and shard.

    Its result is `(K, *S, 2)`, uint32, for K rows and S shards along the other axes.
    """
    if not isinstance(sharding, NamedSharding):
        return jax.jit(lambda leaf: _digest(leaf, has_rows, shape, [0] * len(shape)))
    entries = list(map(axis_names, sharding.spec))
    entries += [()] * (len(shape) - len(entries))

    def digest(shard: jax.Array, starts: Sequence[Any]) -> jax.Array:
        return _digest(shard, has_rows, shape, starts)

    out_spec = P(*([] if has_rows else [None]), *(names or None for names in entries))
    return jax.jit(map_shards(digest, sharding, out_spec))


def _digest(
    shard: jax.Array, has_rows: bool, shape: Sequence[int], starts: Sequence[Any]
) -> jax.Array:
    """Returns the sums of each row of a shard, `(rows, 1, ..., 1, 2)`.

    Args:
      shard: shard of an array.
      has_rows: whether the leading axis is the worker axis.
      shape: shape of the array.
      starts: index in the array of the first element of the shard.
    """
    words = _words(shard if has_rows else shard[None])
    num_words = words.shape[1 + shard.ndim - has_rows :]
    low, high = _positions(
        words.shape[1:],
        (*shape[has_rows:], *num_words),
        (*starts[has_rows:], *[0] * len(num_words)),
    )
    mixed = [
        _mix(words ^ (low * np.uint32(first) + high * np.uint32(second))[None], *mixer)
        for mixer, (first, second) in zip(MIXERS, POSITION_MULTIPLIERS, strict=True)
    ]
    # One reduction of the pair: XLA:CPU vectorises it, but not two of the same words.
    zeros = (np.uint32(0),) * len(mixed)
    sums = lax.reduce(tuple(mixed), zeros, _add, tuple(range(1, words.ndim)))
    return jnp.stack(sums, 1).reshape(len(words), *[1] * (shard.ndim - has_rows), 2)


def _add(left: tuple, right: tuple) -> tuple:
    """Adds tuples of arrays."""
    return jax.tree.map(operator.add, left, right)


def _sum_shards(sums: np.ndarray) -> np.ndarray:
    """Adds the sums of the shards of each row; returns `(K, 2)`."""
    return sums.sum(tuple(range(1, sums.ndim - 1)), dtype=np.uint32)


def _words(x: jax.Array) -> jax.Array:
    """Returns the bits of an array as 32-bit words.

    Elements of 64 or 128 bits become a trailing axis of words. Smaller elements are
    extended to a word.
    """
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = (
        jnp.iinfo(x.dtype).bits
        if jnp.issubdtype(x.dtype, jnp.integer)
        else jnp.finfo(x.dtype).bits
    )
    if bits >= 32:
        return lax.bitcast_convert_type(x, jnp.uint32)
    if bits < 8:  # Conversion to int8 or float32 is exact.
        is_integer = jnp.issubdtype(x.dtype, jnp.integer)
        return _words(x.astype(jnp.int8 if is_integer else jnp.float32))
    unsigned = jnp.uint8 if bits == 8 else jnp.uint16
    return lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _positions(
    local_shape: tuple[int, ...], shape: tuple[int, ...], starts: Sequence[Any]
) -> tuple[jax.Array, jax.Array | np.uint32]:
    """Returns the positions of a shard's elements, split into two 32-bit numbers.

    The low half counts within the last axes with at most LOW_HALF elements together.

    Args:
      local_shape: shape of the shard.
      shape: shape of the array.
      starts: index in the array of the first element of the shard.
    """
    low, high = jnp.zeros(local_shape, jnp.uint32), np.uint32(0)
    last = len(shape)
    while last and math.prod(shape[last - 1 :]) <= LOW_HALF:
        last -= 1

    def offsets(axis: int, end: int) -> jax.Array:
        stride = np.uint32(math.prod(shape[axis + 1 : end]) % 2**32)
        start = jnp.asarray(starts[axis], jnp.uint32)
        return (lax.broadcasted_iota(jnp.uint32, local_shape, axis) + start) * stride

    for axis in range(last, len(shape)):
        low += offsets(axis, len(shape))
    for axis in range(last):
        high += offsets(axis, last)
    return low, high


def _mix(x: jax.Array, multipliers: tuple, shifts: tuple) -> jax.Array:
    """Permutes the 32-bit integers: each bit of `x` affects all bits of the result."""
    x ^= x >> shifts[0]
    x *= np.uint32(multipliers[0])
    x ^= x >> shifts[1]
    x *= np.uint32(multipliers[1])
    return x ^ (x >> shifts[2])
