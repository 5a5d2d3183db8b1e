"""Encoding of the largest numbers of each chunk as packed positions and values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BIN_WIDTH = 1.5  # In units of σ: four bins cover 6 σ.


class SparseMessage(NamedTuple):
    """Encoded numbers of M chunks, `k` from each.

    Attributes:
      codes: bit planes of the codes, uint8, `(bits, ⌈k/8⌉, M)`.
      values: bfloat16 levels as uint16, `(2, M)`; without quantisation the numbers,
        float32, `(k, M)`.
    """

    codes: jax.Array
    values: jax.Array


def encode(
    values: jax.Array, positions: jax.Array, chunk: int, quantized: bool
) -> SparseMessage:
    """Encodes numbers and their positions in chunks.

    A code has the bits of the position. If the numbers are quantised, two more bits are
    the sign and whether |v| > 1.5 σ, with σ the root mean square of the k numbers. The
    two levels of a chunk are the means of |v| below and above this bound.

    Args:
      values: v, `(k, M)`, float32.
      positions: `(k, M)`, int32, below `chunk`.
      chunk: length of a chunk.
      quantized: whether values are sent as 2 bits.

    Returns:
      The message.

    Example:
      >>> message = encode(jnp.array([[3.0], [-1.0]]), jnp.array([[0], [2]]), 4, True)
      >>> decode(message, 2, 4, True)[0].T
      Array([[ 2., -2.]], dtype=float32)
    """
    bits = position_bits(chunk)
    if not quantized:
        return SparseMessage(_to_planes(positions, bits), values)
    magnitude = jnp.abs(values)
    sigma = jnp.sqrt(jnp.mean(values**2, axis=0))
    is_large = magnitude > BIN_WIDTH * sigma[None]

    def mean_over(selected: jax.Array) -> jax.Array:
        count = jnp.maximum(jnp.sum(selected, axis=0), 1)
        return jnp.sum(jnp.where(selected, magnitude, 0), axis=0) / count

    levels = jnp.stack([mean_over(~is_large), mean_over(is_large)])
    sign_and_size = (values < 0) + 2 * is_large.astype(jnp.int32)
    codes = positions | (sign_and_size << bits)
    levels = jax.lax.bitcast_convert_type(levels.astype(jnp.bfloat16), jnp.uint16)
    return SparseMessage(_to_planes(codes, bits + 2), levels)


def decode(
    message: SparseMessage, k: int, chunk: int, quantized: bool
) -> tuple[jax.Array, jax.Array]:
    """Inverts `encode`.

    Args:
      message: leaves with any leading axes.
      k: numbers per chunk.
      chunk: length of a chunk.
      quantized: as in `encode`.

    Returns:
      Values, float32, and positions, int32, both `(..., k, M)`.
    """
    bits = position_bits(chunk)
    codes = _from_planes(message.codes, k)
    positions = codes & ((1 << bits) - 1)
    if not quantized:
        return message.values, positions
    levels = jax.lax.bitcast_convert_type(message.values, jnp.bfloat16)
    levels = levels.astype(jnp.float32)
    sign_and_size = codes >> bits
    is_large = sign_and_size >> 1
    low, high = levels[..., :1, :], levels[..., 1:, :]
    magnitude = jnp.where(is_large == 1, high, low)
    return jnp.where(sign_and_size & 1, -magnitude, magnitude), positions


def position_bits(chunk: int) -> int:
    """Returns the number of bits of a position in a chunk.

    Example:
      >>> position_bits(4096), position_bits(4), position_bits(1)
      (12, 2, 1)
    """
    return max((chunk - 1).bit_length(), 1)


def _to_planes(codes: jax.Array, bits: int) -> jax.Array:
    """Packs codes `(k, M)` into bit planes, eight codes per byte."""
    padded = jnp.pad(codes, ((0, -len(codes) % 8), (0, 0)))
    groups = padded.reshape(8, -1, codes.shape[-1])
    shifts = jnp.arange(8, dtype=jnp.int32)[:, None, None]
    planes = [
        jnp.sum(((groups >> bit) & 1) << shifts, axis=0).astype(jnp.uint8)
        for bit in range(bits)
    ]
    return jnp.stack(planes)


def _from_planes(planes: jax.Array, k: int) -> jax.Array:
    """Unpacks k codes, `(..., k, M)`, from bit planes `(..., bits, ⌈k/8⌉, M)`."""
    wide = planes.astype(jnp.int32)
    codes = jnp.int32(0)
    for bit in range(planes.shape[-3]):
        plane = wide[..., bit, :, :]
        groups = [((plane >> i) & 1) << bit for i in range(8)]
        codes = codes | jnp.concatenate(groups, axis=-2)
    return codes[..., :k, :]
