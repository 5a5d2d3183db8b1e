"""Codecs: encoded sizes, errors and round trips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.selection import keep

from localsgd_jax.rules.codecs import BITS, float_codec, integer_codec


@pytest.mark.parametrize("bits", keep(BITS, [4, 1]))
@pytest.mark.parametrize("stochastic", [False, True])
def test_integer_codec_round_trip(bits, stochastic):
    rng = np.random.default_rng(bits)
    x = rng.normal(size=(3, 64)).astype(np.float32) * [[1.0], [1e-3], [0.0]]
    codec = integer_codec(bits, 16, stochastic)
    payload = codec.encode(jnp.asarray(x, jnp.float32), jax.random.key(0))
    assert payload.dtype == jnp.uint8 and payload.shape == (3, 64 * bits // 8 + 4 * 4)
    decoded = np.asarray(codec.decode(payload))
    blocks, decoded_blocks = x.reshape(3, 4, 16), decoded.reshape(3, 4, 16)
    if bits == 1:
        scale = np.abs(blocks).mean(axis=2, keepdims=True)
        expected = np.where(blocks >= 0, 1, -1) * scale
        np.testing.assert_allclose(decoded_blocks, expected, 1e-6)
        return
    step = np.abs(blocks).max(axis=2, keepdims=True) / (2 ** (bits - 1) - 1)
    tolerance = step * (1.001 if stochastic else 0.501)
    assert (np.abs(decoded_blocks - blocks) <= tolerance).all()
    encoded_again = codec.encode(jnp.asarray(decoded), jax.random.key(1))
    if not stochastic:
        np.testing.assert_allclose(codec.decode(encoded_again), decoded, rtol=1e-6)


def test_stochastic_rounding_is_unbiased():
    x = jnp.asarray(np.random.default_rng(0).normal(size=16), jnp.float32)
    codec = integer_codec(2, 16, True)
    decoded = jax.vmap(lambda key: codec.decode(codec.encode(x, key)))(
        jax.random.split(jax.random.key(0), 20_000)
    )
    deviation = float(jnp.abs(x).max()) / 20_000**0.5
    np.testing.assert_allclose(decoded.mean(0), x, atol=4 * deviation)


def test_float_codec_round_trip():
    x = jnp.array([[1.0, -3.14159, 1e-3, 1e6]])
    for dtype, tolerance in ((jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)):
        codec = float_codec(dtype)
        payload = codec.encode(x[:, :3], None)
        assert payload.nbytes == 6
        np.testing.assert_allclose(codec.decode(payload), x[:, :3], tolerance)
    codec = float_codec(jnp.float8_e4m3fn)
    decoded = codec.decode(codec.encode(x, None))
    np.testing.assert_allclose(decoded[0, :2], x[0, :2], rtol=2**-4)
    assert decoded[0, 3] == 448  # The largest finite number, and not NaN.
