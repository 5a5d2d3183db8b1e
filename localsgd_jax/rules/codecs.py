"""How numbers are written for the wire: codecs between vectors and bytes."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

BITS = (8, 4, 2, 1)
_SCALE = 4  # bytes of a float32 scale


class Codec(NamedTuple):
    """A way to write rows of numbers.

    Attributes:
      encode: `encode(x, key)`, from float32 `(..., m)`, m a multiple of `block`, to
        what travels, bytes `(..., p)`. The key is for stochastic rounding.
      decode: from `(..., p)` to `(..., m)`.
      block: numbers that are written together.
    """

    encode: Callable[[jax.Array, jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    block: int


def floats(dtype: jax.typing.DTypeLike) -> Codec:
    """Writes numbers as shorter floats; what is too large becomes the largest.

    Args:
      dtype: a floating point type of one or two bytes.

    Returns:
      A codec.
    """
    dtype = jnp.dtype(dtype)
    largest = float(jnp.finfo(dtype).max)

    def encode(x: jax.Array, key: jax.Array) -> jax.Array:
        del key
        short = jnp.clip(x, -largest, largest).astype(dtype)
        # As bytes: some backends would send a short float as a long one.
        return _bytes(short)

    def decode(payload: jax.Array) -> jax.Array:
        return _from_bytes(payload, dtype).astype(jnp.float32)

    return Codec(encode, decode, 1)


def integers(bits: int, block: int, stochastic: bool) -> Codec:
    """Writes b-bit integers and a float32 scale for each block.

        q = round(x L / s) ∈ {−L, …, L},   L = 2^(b−1) − 1,   s = max |x| over the block

    For b = 1: q = sign(x) and s = mean |x|.

    Args:
      bits: b, one of 8, 4, 2, 1.
      block: numbers that share a scale, a multiple of 8.
      stochastic: whether to round up with a probability that makes the mean exact; to
        the nearest otherwise.

    Returns:
      A codec of b + 32/block bits a number.
    """
    largest = max(2 ** (bits - 1) - 1, 1)

    def encode(x: jax.Array, key: jax.Array) -> jax.Array:
        blocks = x.reshape(*x.shape[:-1], -1, block)
        size = jnp.abs(blocks)
        if bits == 1:
            scale = size.mean(axis=-1, keepdims=True)
            codes = blocks >= 0
        else:
            scale = size.max(axis=-1, keepdims=True)
            level = blocks * (largest / jnp.where(scale > 0, scale, 1))
            shift = jax.random.uniform(key, level.shape) if stochastic else 0.5
            codes = jnp.clip(jnp.floor(level + shift), -largest, largest) + largest
        packed = pack(codes.astype(jnp.uint8), bits)
        written = jnp.concatenate([packed, _bytes(scale.astype(jnp.float32))], axis=-1)
        return written.reshape(*x.shape[:-1], -1)

    def decode(payload: jax.Array) -> jax.Array:
        blocks = payload.reshape(*payload.shape[:-1], -1, block * bits // 8 + _SCALE)
        codes = unpack(blocks[..., :-_SCALE], bits).astype(jnp.float32)
        scale = _from_bytes(blocks[..., -_SCALE:], jnp.dtype(jnp.float32))
        level = 2 * codes - 1 if bits == 1 else (codes - largest) / largest
        return (level * scale).reshape(*payload.shape[:-1], -1)

    return Codec(encode, decode, block)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Puts 8/b codes of b bits into each byte, the first one lowest.

    Args:
      codes: `(..., m)`, uint8, m a multiple of 8/b.
      bits: b.

    Returns:
      `(..., m b/8)`, uint8.
    """
    codes = codes.reshape(*codes.shape[:-1], -1, 8 // bits)
    parts = [codes[..., i] << jnp.uint8(bits * i) for i in range(8 // bits)]
    return functools.reduce(jnp.bitwise_or, parts)


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """Takes the codes out of their bytes.

    Args:
      packed: from `pack`.
      bits: b.

    Returns:
      The codes.
    """
    last = jnp.uint8(2**bits - 1)
    parts = [(packed >> jnp.uint8(bits * i)) & last for i in range(8 // bits)]
    return jnp.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1)


def _bytes(x: jax.Array) -> jax.Array:
    """Views numbers as bytes, joined along the last axis."""
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], -1)


def _from_bytes(payload: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Views bytes as numbers."""
    if dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(payload, dtype)
    grouped = payload.reshape(*payload.shape[:-1], -1, dtype.itemsize)
    return jax.lax.bitcast_convert_type(grouped, dtype)
