"""Encoded updates with error feedback, and their size."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check, check_dtype, check_int, check_number
from localsgd_jax.rules.codecs import (
    BITS,
    Codec,
    float_codec,
    integer_codec,
    make_codec,
)

_CHUNK = 4096  # Positions in a chunk fit into 16 bits.


class TopKChunks(NamedTuple):
    """Largest numbers of each chunk.

    Attributes:
      values: float32 `(chunks, k)`.
      positions: uint16 `(chunks, k)`, positions in the chunk.
    """

    values: jax.Array
    positions: jax.Array


def full_precision() -> Codec:
    """Sends updates as they are.

    Returns:
      A codec for `Job(compress=...)`, the default.

    Example:
      >>> full_precision().block_size
      1
    """
    return make_codec(lambda x, key: x, lambda payload: payload, 1)


def floats(dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Codec:
    """Sends updates as short floats.

    Args:
      dtype: a floating point type of one or two bytes.

    Returns:
      A codec for `Job(compress=...)`.

    Raises:
      TypeError: if it is not a type.
      ValueError: for another type.

    Example:
      >>> import jax.numpy as jnp
      >>> codec = floats(jnp.bfloat16)
    """
    short = check_dtype("floats(dtype)", "dtype", dtype)
    valid = jnp.issubdtype(short, jnp.floating) and short.itemsize <= 2
    text = "dtype must be a floating point type of one or two bytes"
    check(valid, "floats(dtype)", text, short.name)
    return float_codec(short)


def integers(bits: int, block: int = 256) -> Codec:
    """Sends updates as packed b-bit integers with a scale per block.

    Args:
      bits: b, 8, 4, 2 or 1.
      block: numbers that share a scale, a multiple of 8.

    Returns:
      A codec for `Job(compress=...)`.

    Raises:
      TypeError: if a number is not an int.
      ValueError: if a number is out of range.

    Example:
      >>> codec = integers(4)
    """
    bits = check_int("integers(bits)", "bits", bits, 1)
    check(bits in BITS, "integers(bits)", f"bits must be one of {BITS}", bits)
    check_int("integers(block)", "block", block, 8)
    check(block % 8 == 0, "integers(block)", "block must be a multiple of 8", block)
    return integer_codec(bits, block, stochastic=False)


def largest(fraction: float, chunk: int = _CHUNK) -> Codec:
    """Sends the largest numbers of each chunk of an update, with their positions.

    Args:
      fraction: fraction of the numbers that is sent, in (0, 1].
      chunk: numbers per chunk, at most 65536.

    Returns:
      A codec of 6 bytes per number that is sent, for `Job(compress=...)`.

    Raises:
      TypeError: if the chunk is not an int.
      ValueError: if a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> codec = largest(0.5, chunk=4)
      >>> payload = codec.encode(jnp.array([1.0, -3.0, 0.5, 2.0]), None)
      >>> codec.decode(payload)
      Array([ 0., -3.,  0.,  2.], dtype=float32)
    """
    check_number("largest(fraction)", "fraction", fraction, at_least=0, at_most=1)
    check(fraction > 0, "largest(fraction)", "fraction must be above 0", fraction)
    check_int("largest(chunk)", "chunk", chunk, 1)
    check(chunk <= 2**16, "largest(chunk)", "chunk must be at most 65536", chunk)
    count = math.ceil(fraction * chunk)

    def encode(x: jax.Array, key: jax.Array) -> TopKChunks:
        del key
        rows = x.reshape(-1, chunk)
        _, positions = jax.lax.top_k(jnp.abs(rows), count)
        values = jnp.take_along_axis(rows, positions, axis=-1)
        return TopKChunks(values, positions.astype(jnp.uint16))

    def decode(payload: TopKChunks) -> jax.Array:
        rows = jnp.zeros((payload.values.shape[0], chunk), jnp.float32)
        chunks = jnp.arange(rows.shape[0])[:, None]
        return rows.at[chunks, payload.positions].set(payload.values).reshape(-1)

    return make_codec(encode, decode, chunk)


def encode_update(
    codec: Codec, update: jax.Array, error: jax.Array
) -> tuple[PyTree, jax.Array]:
    """Encodes an update with error feedback.

        v = p + e,   payload = encode(v),   e ← v − decode(payload)

    Args:
      codec: how numbers are encoded.
      update: p, `(n,)`.
      error: e, `(n,)`.

    Returns:
      The payload and the new error.
    """
    message = update + error
    payload = codec.encode(_pad(codec, message), jax.random.key(0))
    return payload, message - decode_update(codec, payload, message.size)


def decode_update(codec: Codec, payload: PyTree, size: int) -> jax.Array:
    """Decodes an update to `(size,)`."""
    return codec.decode(payload)[:size]


def payload_bytes(payload: PyTree) -> int:
    """Returns the bytes of the arrays of a payload or model."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(payload))


def _pad(codec: Codec, vector: jax.Array) -> jax.Array:
    """Pads a vector to complete blocks."""
    return jnp.pad(vector, (0, -vector.size % codec.block_size))
