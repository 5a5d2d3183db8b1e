"""Codecs that encode float vectors as short floats or packed integers.

An array whose last axis is shorter than 128 is padded to 128 on TPUs. Long rows are
therefore encoded as `(..., r, 128)`, and codes are packed from contiguous parts of a
row instead of neighbours.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from localsgd_jax.core.types import PyTree

BITS = (8, 4, 2, 1)
_LANES = 128  # Length of the last axis of a TPU tile.
_TILE = 8 * _LANES  # Numbers in a TPU tile of float32.
_MAX_PADDING = 1 / 64  # Part of a row that may be padding to whole tiles.


class Codec(NamedTuple):
    """Encoder and decoder of vectors.

    Attributes:
      encode: `encode(x, key)`, from float32 `(..., m)`, m a multiple of `block_size`,
        to a pytree of arrays with the same leading axes, to be sent. The key is for
        stochastic rounding.
      decode: from this pytree to float32 `(..., m)`.
      round_trip: `decode(encode(x, key))` without packing, in the shape of x.
      block_size: numbers that are encoded together.
    """

    encode: Callable[[jax.Array, jax.Array], PyTree]
    decode: Callable[[PyTree], jax.Array]
    round_trip: Callable[[jax.Array, jax.Array], jax.Array]
    block_size: int


def make_codec(encode: Callable, decode: Callable, block_size: int) -> Codec:
    """Makes a codec with a round trip through packed codes."""

    def round_trip(x: jax.Array, key: jax.Array) -> jax.Array:
        return decode(encode(x, key)).reshape(x.shape)

    return Codec(encode, decode, round_trip, block_size)


class QuantizedBlocks(NamedTuple):
    """Encoded vectors of an integer codec.

    Attributes:
      codes: packed integers, uint8, as from `pack`.
      scales: one per block, float32, `(..., m/block)`.
    """

    codes: jax.Array
    scales: jax.Array


def row_multiple(block_size: int, length: int) -> int:
    """Returns the number of which the length of a row should be a multiple.

    Rows of whole tiles are encoded without a change of layout on TPUs. With a multiple
    of 128 blocks, whose scales fill tiles too, the all-gather of the scales is not
    compiled to an all-reduce, which sends twice the bytes. Such padding is omitted
    where it could exceed 1/64 of a row.

    Args:
      block_size: numbers that are encoded together.
      length: approximate length of a row.

    Returns:
      The block size, or a multiple of it.

    Example:
      >>> [row_multiple(256, length) for length in (1000, 100_000, 10_000_000)]
      [256, 1024, 32768]
    """
    for size in (block_size * _LANES, block_size):
        multiple = math.lcm(size, _TILE)
        if multiple <= _MAX_PADDING * length:
            return multiple
    return block_size


def split_tiles(vector: jax.Array, rows: int, multiple: int) -> jax.Array:
    """Splits a vector into rows of tiles of TPUs, zero-padded at the end.

    Args:
      vector: `(N,)`.
      rows: K.
      multiple: from `row_multiple`.

    Returns:
      `(K, m/128, 128)`, m a multiple of `multiple`; `(K, 1, m)` if 128 does not divide
      m.

    Example:
      >>> split_tiles(jnp.arange(3), 2, 1)
      Array([[[0, 1]],
      <BLANKLINE>
             [[2, 0]]], dtype=int32)
    """
    # XLA:CPU pads a vector once for each use, but concatenates leaves and zeros once.
    zeros = jnp.zeros(-vector.size % (rows * multiple), vector.dtype)
    padded = jnp.concatenate([vector, zeros]) if zeros.size else vector
    size = padded.size // rows
    return padded.reshape(rows, -1, _LANES if size % _LANES == 0 else size)


def float_codec(dtype: jax.typing.DTypeLike) -> Codec:
    """Encodes numbers as shorter floats; numbers beyond the range are clipped.

    Args:
      dtype: a floating point type of one or two bytes.

    Returns:
      A codec. It encodes to unsigned integers, because some backends widen short floats
      in a collective.
    """
    dtype = jnp.dtype(dtype)
    largest = float(jnp.finfo(dtype).max)
    carrier = jnp.uint8 if dtype.itemsize == 1 else jnp.uint16

    def encode(x: jax.Array, key: jax.Array) -> jax.Array:
        del key
        width = _LANES if x.shape[-1] % _LANES == 0 else x.shape[-1]
        rows = x.reshape(*x.shape[:-1], -1, width)
        short = jnp.clip(rows, -largest, largest).astype(dtype)
        return jax.lax.bitcast_convert_type(short, carrier)

    def decode(payload: jax.Array) -> jax.Array:
        short = jax.lax.bitcast_convert_type(payload, dtype)
        return short.astype(jnp.float32).reshape(*short.shape[:-2], -1)

    return make_codec(encode, decode, 1)


def integer_codec(bits: int, block: int, stochastic: bool) -> Codec:
    """Encodes numbers as b-bit integers with a float32 scale per block.

        q = round(x L / s) ∈ {−L, …, L},   L = 2^(b−1) − 1,   s = max |x| over the block

    For b = 1: q = sign(x) and s = mean |x|.

    Args:
      bits: b, one of 8, 4, 2, 1.
      block: numbers that share a scale, a multiple of 8. A multiple of 128 takes the
        least memory on TPUs.
      stochastic: whether to use stochastic rounding, which is unbiased, instead of
        rounding to the nearest integer.

    Returns:
      A codec of b + 32/block bits per number, which encodes to `QuantizedBlocks`.
    """
    largest = max(2 ** (bits - 1) - 1, 1)

    def scale_of(blocks: jax.Array) -> jax.Array:
        if bits == 1:
            return jnp.abs(blocks).mean(axis=-2).mean(axis=-1)
        return largest_magnitude(blocks)

    def to_codes(blocks: jax.Array, scale: jax.Array, key: jax.Array) -> jax.Array:
        if bits == 1:
            return (blocks >= 0).astype(jnp.float32)
        inverse = largest / jnp.where(scale > 0, scale, 1)
        level = blocks * inverse[..., None, None]
        shift = jax.random.uniform(key, level.shape) if stochastic else 0.5
        return jnp.clip(jnp.floor(level + shift), -largest, largest) + largest

    def to_values(codes: jax.Array) -> jax.Array:
        return 2 * codes - 1 if bits == 1 else (codes - largest) / largest

    return block_codec(bits, block, scale_of, to_codes, to_values)


def largest_magnitude(blocks: jax.Array) -> jax.Array:
    """Returns max |x| of blocks, from `(..., r, w)` to `(...)`."""
    # XLA:CPU vectorises max and min, but not the max of absolute values.
    extremes = jnp.maximum(blocks.max(axis=-2), -blocks.min(axis=-2))
    return extremes.max(axis=-1)


def block_codec(
    bits: int, block: int, scale_of: Callable, to_codes: Callable, to_values: Callable
) -> Codec:
    """Makes a codec of b-bit codes with a float32 scale per block.

        x ≈ s value(code(x, s))

    Args:
      bits: b.
      block: numbers that share a scale, a multiple of 8.
      scale_of: `scale_of(blocks) -> s`, from `(..., r, w)` with r w = block to `(...)`.
      to_codes: `to_codes(blocks, s, key) -> codes`, from 0 to 2ᵇ − 1, float32.
      to_values: `to_values(codes)`, elementwise on float32.

    Returns:
      A codec, which encodes to `QuantizedBlocks`.
    """
    width = _LANES if block % _LANES == 0 else block

    def quantize(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        split = x.reshape(*x.shape[:-1], -1, block // width, width)
        blocks = _materialize_on_tpu(split)
        scale = scale_of(blocks)
        return to_codes(blocks, scale, key), scale

    def encode(x: jax.Array, key: jax.Array) -> QuantizedBlocks:
        codes, scale = quantize(x, key)
        packed = pack(codes.astype(jnp.uint8).reshape(x.shape), bits)
        return QuantizedBlocks(packed, scale.astype(jnp.float32))

    def decode(payload: QuantizedBlocks) -> jax.Array:
        codes = unpack(payload.codes, bits)
        rows = codes.reshape(*codes.shape[:-1], -1, width).astype(jnp.float32)
        row_scales = _repeat(payload.scales, block // width)
        decoded = _materialize_on_tpu(to_values(rows) * row_scales[..., None])
        return decoded.reshape(codes.shape)

    def round_trip(x: jax.Array, key: jax.Array) -> jax.Array:
        codes, scale = quantize(x, key)
        return (to_values(codes) * scale[..., None, None]).reshape(x.shape)

    return Codec(encode, decode, round_trip, block)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs codes of b bits, one from each of the 8/b equal parts of a row, into bytes.

    Byte j holds the codes j, j + p, j + 2 p, …, the first in the lowest bits, with
    p = m b/8.

    Args:
      codes: `(..., m)`, uint8, m a multiple of 8/b.
      bits: b.

    Returns:
      `(..., p/128, 128)`, uint8; `(..., 1, p)` if 128 does not divide p.

    Example:
      >>> pack(jnp.array([1, 0, 3, 0], jnp.uint8), 2)
      Array([[49]], dtype=uint8)
    """
    parts, size = 8 // bits, codes.shape[-1] * bits // 8
    width = _LANES if size % _LANES == 0 else size
    codes = codes.reshape(*codes.shape[:-1], parts, -1, width)
    shifted = [codes[..., i, :, :] << jnp.uint8(bits * i) for i in range(parts)]
    return functools.reduce(jnp.bitwise_or, shifted)


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """Unpacks the codes of `pack`.

    Args:
      packed: uint8, from `pack`.
      bits: b.

    Returns:
      `(..., m)`, uint8.

    Example:
      >>> unpack(jnp.array([[49]], jnp.uint8), 2)
      Array([1, 0, 3, 0], dtype=uint8)
    """
    *leading, rows, columns = packed.shape
    part = jax.lax.broadcasted_iota(
        jnp.uint8, (*leading, 8 // bits, rows, columns), len(leading)
    )
    shifted = packed[..., None, :, :] >> (jnp.uint8(bits) * part)
    parts = shifted & jnp.uint8(2**bits - 1)
    return parts.reshape(*leading, -1)


def _materialize_on_tpu(rows: jax.Array) -> jax.Array:
    """Keeps reshapes of rows apart from the operations on them, on TPUs.

    XLA:TPU otherwise copies each operand of these operations to the layouts of the
    leaves. On CPUs a barrier would prevent fusion.
    """
    return jax.lax.platform_dependent(
        rows, tpu=jax.lax.optimization_barrier, default=lambda rows: rows
    )


def _repeat(scales: jax.Array, times: int) -> jax.Array:
    """Repeats each number, `(..., b)` to `(..., b times)`."""
    repeat = functools.partial(jnp.repeat, repeats=times, axis=-1)
    if times == 1 or scales.shape[-1] % _LANES:
        return repeat(scales)
    by_product = functools.partial(_repeat_by_product, times=times)
    return jax.lax.platform_dependent(scales, tpu=by_product, default=repeat)


def _repeat_by_product(scales: jax.Array, times: int) -> jax.Array:
    """Repeats each number by a product with a matrix of zeros and ones.

    On TPUs repetition along the last axis takes 512 bytes a number. The products are of
    halves of the bit patterns, which are finite and exact.
    """
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint32)
    bits = bits.reshape(*bits.shape[:-1], -1, _LANES)
    copies = jnp.repeat(jnp.eye(_LANES), times, axis=1)

    def repeat(half: jax.Array) -> jax.Array:
        product = jnp.dot(half.astype(jnp.float32), copies, precision="highest")
        return product.astype(jnp.uint32)

    repeated = (repeat(bits >> 16) << 16) | repeat(bits & 0xFFFF)
    repeated = repeated.reshape(*scales.shape[:-1], -1)
    return jax.lax.bitcast_convert_type(repeated, jnp.float32)
