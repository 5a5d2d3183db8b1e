"""Codec of 4-bit floats with a sign and three exponent bits, E3M0."""

import jax
import jax.numpy as jnp

from localsgd_jax.rules.codecs import (
    Codec,
    QuantizedBlocks,
    make_codec,
    pack,
    unpack,
)

_LEVELS = 7  # Besides zero.


def float4_codec(block: int, stochastic: bool) -> Codec:
    """Encodes numbers as E3M0 floats with a float32 scale per block.

        x ≈ ± s 2^(L − 7) for L ∈ {1, …, 7}, or 0 for L = 0

    with s = max |x| over the block.

    Args:
      block: numbers that share a scale, a multiple of 8.
      stochastic: whether to round between two neighbours at random without bias,
        instead of to the nearest.

    Returns:
      A codec of 4 + 32/block bits per number. A code is L, plus 8 for a negative sign.
    """

    def encode(x: jax.Array, key: jax.Array) -> QuantizedBlocks:
        rows = x.reshape(*x.shape[:-1], -1, block)
        # XLA:CPU vectorises max and min, but not the max of absolute values.
        scale = jnp.maximum(jnp.max(rows, axis=-1), -jnp.min(rows, axis=-1))
        relative = jnp.abs(rows) / jnp.where(scale > 0, scale, 1)[..., None]
        shift = jax.random.uniform(key, rows.shape) if stochastic else 0.5
        level = jnp.zeros(rows.shape, jnp.uint8)
        for upper in range(1, _LEVELS + 1):
            low, high = _value(upper - 1), _value(upper)
            level += (relative > low + shift * (high - low)).astype(jnp.uint8)
        codes = jnp.where(rows < 0, level + jnp.uint8(8), level)
        return QuantizedBlocks(pack(codes.reshape(x.shape), 4), scale)

    def decode(payload: QuantizedBlocks) -> jax.Array:
        codes = unpack(payload.codes, 4)
        rows = codes.reshape(*codes.shape[:-1], -1, block)
        level = (rows & 7).astype(jnp.float32)
        magnitude = jnp.where(level > 0, jnp.exp2(level - _LEVELS), 0)
        signed = jnp.where(rows >= 8, -magnitude, magnitude)
        return (signed * payload.scales[..., None]).reshape(codes.shape)

    return make_codec(encode, decode, block)


def _value(level: int) -> float:
    """Returns the value of a level for the scale 1."""
    return 2.0 ** (level - _LEVELS) if level else 0.0
