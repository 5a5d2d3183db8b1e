"""Codec of 4-bit floats with a sign and three exponent bits, E3M0."""

import jax
import jax.numpy as jnp

from localsgd_jax.rules.codecs import Codec, block_codec, largest_magnitude

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

    def to_codes(blocks: jax.Array, scale: jax.Array, key: jax.Array) -> jax.Array:
        relative = jnp.abs(blocks) / jnp.where(scale > 0, scale, 1)[..., None, None]
        shift = jax.random.uniform(key, blocks.shape) if stochastic else 0.5
        level = jnp.zeros(blocks.shape, jnp.float32)
        for upper in range(1, _LEVELS + 1):
            low, high = _value(upper - 1), _value(upper)
            level += relative > low + shift * (high - low)
        return jnp.where(blocks < 0, level + 8, level)

    def to_values(codes: jax.Array) -> jax.Array:
        level = codes.astype(jnp.int32) & 7
        # The exponent bits of 2^(L − 7); exp2 is not exact on all backends.
        power = jax.lax.bitcast_convert_type((level + 127 - _LEVELS) << 23, jnp.float32)
        magnitude = jnp.where(level > 0, power, 0)
        return jnp.where(codes >= 8, -magnitude, magnitude)

    return block_codec(4, block, largest_magnitude, to_codes, to_values)


def _value(level: int) -> float:
    """Returns the value of a level for the scale 1."""
    return 2.0 ** (level - _LEVELS) if level else 0.0
