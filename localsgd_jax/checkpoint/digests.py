"""Digests of checkpoints, independent of the layout of the leaves.

The digest of an array is the pair of sums

    aⱼ = Σᵢ hⱼ(wᵢ, i) mod 2³²,  j = 1, 2

over its 32-bit words wᵢ with their positions i. Addition of integers commutes, so each
device sums over its own shard and the digest does not depend on the sharding. For a
fixed i both functions hⱼ(·, i) are permutations: every change within a single word is
detected. Any other damage passes with probability 2⁻⁶⁴ if the hⱼ are random functions.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from localsgd_jax.distributed.arrays import to_host

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
    sums = [_digest(leaf, rows) for leaf, rows in zip(leaves, has_rows, strict=True)]
    return [[f"{a:08x}{b:08x}" for a, b in pairs] for pairs in to_host(sums)]


def json_digest(values: Mapping[str, Any]) -> str:
    """Returns the SHA-256 digest of JSON-compatible values."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.partial(jax.jit, static_argnames="has_rows")
def _digest(leaf: jax.Array, has_rows: bool) -> jax.Array:
    """Returns the sums of each row, `(K, 2)` uint32, or `(1, 2)` for the array."""
    words = _words(leaf if has_rows else leaf[None])
    low, high = _positions(words.shape[1:])
    sums = []
    for mixer, (low_multiplier, high_multiplier) in zip(
        MIXERS, POSITION_MULTIPLIERS, strict=True
    ):
        keys = low * np.uint32(low_multiplier) + high * np.uint32(high_multiplier)
        mixed = _mix(words ^ keys[None], *mixer)
        sums.append(mixed.sum(tuple(range(1, words.ndim)), dtype=jnp.uint32))
    return jnp.stack(sums, axis=1)


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


def _positions(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array | np.uint32]:
    """Returns the positions in an array, split into two 32-bit numbers.

    The low half counts within the last axes with at most LOW_HALF elements together.
    """
    low, high = jnp.zeros(shape, jnp.uint32), np.uint32(0)
    last = len(shape)
    while last and math.prod(shape[last - 1 :]) <= LOW_HALF:
        last -= 1
    for axis in range(last, len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        low += lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    for axis in range(last):
        stride = np.uint32(math.prod(shape[axis + 1 : last]) % 2**32)
        high += lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return low, high


def _mix(x: jax.Array, multipliers: tuple, shifts: tuple) -> jax.Array:
    """Permutes the 32-bit integers: each bit of `x` affects all bits of the result."""
    x ^= x >> shifts[0]
    x *= np.uint32(multipliers[0])
    x ^= x >> shifts[1]
    x *= np.uint32(multipliers[1])
    return x ^ (x >> shifts[2])
