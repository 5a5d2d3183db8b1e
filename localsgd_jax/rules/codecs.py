"""Codecs that encode float vectors as bytes: short floats and packed integers."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

BITS = (8, 4, 2, 1)
_SCALE_BYTES = 4  # bytes of a float32 scale


class Codec(NamedTuple):
    """Encoder and decoder of vectors.

    Attributes:
      encode: `encode(x, key)`, from float32 `(..., m)`, m a multiple of `block_size`,
        to bytes `(..., p)`, uint8. The key is for stochastic rounding.
      decode: from bytes `(..., p)` to float32 `(..., m)`.
      block_size: numbers that are encoded together.
    """

    encode: Callable[[jax.Array, jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    block_size: int


def float_codec(dtype: jax.typing.DTypeLike) -> Codec:
    """Encodes numbers as shorter floats; numbers beyond the range are clipped.

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
        # Sent as bytes, because some backends widen short floats in a collective.
        return _to_bytes(short)

    def decode(payload: jax.Array) -> jax.Array:
        return _from_bytes(payload, dtype).astype(jnp.float32)

    return Codec(encode, decode, 1)


def integer_codec(bits: int, block: int, stochastic: bool) -> Codec:
    """Encodes numbers as b-bit integers with a float32 scale per block.

        q = round(x L / s) ∈ {−L, …, L},   L = 2^(b−1) − 1,   s = max |x| over the block

    For b = 1: q = sign(x) and s = mean |x|.

    Args:
      bits: b, one of 8, 4, 2, 1.
      block: numbers that share a scale, a multiple of 8.
      stochastic: whether to use stochastic rounding, which is unbiased, instead of
        rounding to the nearest integer.

    Returns:
      A codec of b + 32/block bits per number.
    """
    largest = max(2 ** (bits - 1) - 1, 1)

    def encode(x: jax.Array, key: jax.Array) -> jax.Array:
        blocks = x.reshape(*x.shape[:-1], -1, block)
        magnitude = jnp.abs(blocks)
        if bits == 1:
            scale = magnitude.mean(axis=-1, keepdims=True)
            codes = blocks >= 0
        else:
            scale = magnitude.max(axis=-1, keepdims=True)
            level = blocks * (largest / jnp.where(scale > 0, scale, 1))
            shift = jax.random.uniform(key, level.shape) if stochastic else 0.5
            codes = jnp.clip(jnp.floor(level + shift), -largest, largest) + largest
        packed = pack(codes.astype(jnp.uint8), bits)
        scale_bytes = _to_bytes(scale.astype(jnp.float32))
        encoded = jnp.concatenate([packed, scale_bytes], axis=-1)
        return encoded.reshape(*x.shape[:-1], -1)

    def decode(payload: jax.Array) -> jax.Array:
        block_bytes = block * bits // 8 + _SCALE_BYTES
        blocks = payload.reshape(*payload.shape[:-1], -1, block_bytes)
        codes = unpack(blocks[..., :-_SCALE_BYTES], bits).astype(jnp.float32)
        scale = _from_bytes(blocks[..., -_SCALE_BYTES:], jnp.dtype(jnp.float32))
        level = 2 * codes - 1 if bits == 1 else (codes - largest) / largest
        return (level * scale).reshape(*payload.shape[:-1], -1)

    return Codec(encode, decode, block)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs 8/b codes of b bits into each byte, the first in the lowest bits.

    Args:
      codes: `(..., m)`, uint8, m a multiple of 8/b.
      bits: b.

    Returns:
      `(..., m b/8)`, uint8.

    Example:
      >>> pack(jnp.array([1, 0, 3, 0], jnp.uint8), 2)
      Array([49], dtype=uint8)
    """
    codes = codes.reshape(*codes.shape[:-1], -1, 8 // bits)
    shifted = [codes[..., i] << jnp.uint8(bits * i) for i in range(8 // bits)]
    return functools.reduce(jnp.bitwise_or, shifted)


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """Unpacks the codes of `pack`.

    Args:
      packed: `(..., p)`, uint8, from `pack`.
      bits: b.

    Returns:
      `(..., 8 p/b)`, uint8.

    Example:
      >>> unpack(jnp.array([49], jnp.uint8), 2)
      Array([1, 0, 3, 0], dtype=uint8)
    """
    mask = jnp.uint8(2**bits - 1)
    codes = [(packed >> jnp.uint8(bits * i)) & mask for i in range(8 // bits)]
    return jnp.stack(codes, axis=-1).reshape(*packed.shape[:-1], -1)


def _to_bytes(x: jax.Array) -> jax.Array:
    """Reinterprets numbers as bytes, concatenated along the last axis."""
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], -1)


def _from_bytes(payload: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Reinterprets bytes as numbers of a type."""
    if dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(payload, dtype)
    grouped = payload.reshape(*payload.shape[:-1], -1, dtype.itemsize)
    return jax.lax.bitcast_convert_type(grouped, dtype)
