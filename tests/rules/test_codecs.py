"""Codecs: encoded sizes, errors, round trips, and memory of programs for TPUs."""

import functools
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.paths import PROGRAMS, PYTHONPATH
from harness.selection import in_full, keep

from localsgd_jax.analysis import compile_targets
from localsgd_jax.rules import codecs
from localsgd_jax.rules.codecs import (
    BITS,
    float_codec,
    integer_codec,
    pack,
    row_multiple,
    unpack,
)


@pytest.mark.parametrize("bits", keep(BITS, [4]))
@pytest.mark.parametrize("stochastic", [in_full(False), True])
def test_integer_codec_round_trip(bits, stochastic):
    rng = np.random.default_rng(bits)
    x = rng.normal(size=(3, 64)).astype(np.float32) * [[1.0], [1e-3], [0.0]]
    codec = integer_codec(bits, 16, stochastic)
    payload = codec.encode(jnp.asarray(x, jnp.float32), jax.random.key(0))
    assert payload.codes.dtype == jnp.uint8 and payload.scales.dtype == jnp.float32
    assert payload.codes.size == 3 * 64 * bits // 8
    assert payload.scales.shape == (3, 4)
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


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode_and_decode(bits, block, x):
    codec = integer_codec(bits, block, stochastic=False)
    payload = codec.encode(x, jax.random.key(0))
    return payload, codec.decode(payload)


@pytest.mark.parametrize("block", keep([8, 24, 256, 384], [24, 256]))
@pytest.mark.parametrize("bits", keep(BITS, [4, 1]))
def test_integer_codec_scales_consecutive_blocks(bits, block):
    """Compares rows of one block, of few and of whole tiles with NumPy."""
    for count in (1, 5, math.lcm(1024, block) // block):
        x = np.random.default_rng(count).normal(size=(2, count, block))
        x = x.astype(np.float32)
        payload, decoded = encode_and_decode(bits, block, x.reshape(2, -1))
        sizes = payload.codes.nbytes, payload.scales.nbytes
        assert sizes == (2 * count * block * bits // 8, 2 * count * 4)
        if bits == 1:
            scale = np.abs(x).mean(axis=-1, keepdims=True)
            expected = np.where(x >= 0, scale, -scale)
        else:
            largest = np.float32(2 ** (bits - 1) - 1)
            scale = np.abs(x).max(axis=-1, keepdims=True)
            levels = np.floor(x * (largest / scale) + np.float32(0.5))
            expected = levels.clip(-largest, largest) / largest * scale
        np.testing.assert_allclose(decoded.reshape(x.shape), expected, rtol=1e-6)


@pytest.mark.parametrize("size", keep([8, 56, 1024, 3072], [56, 3072]))
@pytest.mark.parametrize("bits", keep(BITS, [2, 1]))
def test_unpack_inverts_pack(bits, size):
    rng = np.random.default_rng(size)
    codes = rng.integers(0, 2**bits, (3, size)).astype(np.uint8)
    packed = pack(jnp.asarray(codes), bits)
    assert packed.nbytes == 3 * size * bits // 8
    np.testing.assert_array_equal(unpack(packed, bits), codes)


def test_repetition_by_a_product_is_exact():
    x = np.random.default_rng(0).normal(size=(2, 256)).astype(np.float32)
    x[0, :5] = np.inf, -np.inf, np.nan, -0.0, 1e-40
    repeated = np.asarray(codecs._repeat_by_product(jnp.asarray(x), 3))
    np.testing.assert_array_equal(
        repeated.view(np.uint32), np.repeat(x, 3, axis=-1).view(np.uint32)
    )


def test_long_rows_are_padded_to_tiles():
    assert row_multiple(256, 65_535) == 256
    assert row_multiple(256, 65_536) == 1024
    assert row_multiple(24, 10**6) == 3072
    assert row_multiple(256, 2**21) == 32768
    codec = integer_codec(1, 256, stochastic=False)
    payload = codec.encode(jnp.ones((4, 2048)), jax.random.key(0))
    assert payload.codes.shape == (4, 2, 128)


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
        assert payload.nbytes == 6 and payload.dtype == jnp.uint16
        np.testing.assert_allclose(codec.decode(payload), x[:, :3], tolerance)
    codec = float_codec(jnp.float8_e4m3fn)
    payload = codec.encode(x, None)
    assert payload.nbytes == 4 and payload.dtype == jnp.uint8
    decoded = codec.decode(payload)
    np.testing.assert_allclose(decoded[0, :2], x[0, :2], rtol=2**-4)
    assert decoded[0, 3] == 448  # The largest finite number, and not NaN.


@pytest.mark.parametrize(
    "family, target", [in_full("tpu", "tpu:v5e:2x2"), in_full("gpu", "gpu:h100:4")]
)
def test_temporary_memory_on_a_target(family, target):
    """Less than 8 bytes per number, also where whole tiles do not divide the vector."""
    if not compile_targets.is_compiler_installed(family):
        pytest.skip(compile_targets.install_command(family))
    # In a child process, since the compiler must load before JAX starts.
    done = subprocess.run(
        [sys.executable, PROGRAMS / "codec_memory.py", target, str(2**24 + 77)],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    bytes_per_number = json.loads(done.stdout)
    assert len(bytes_per_number) == 10
    assert max(bytes_per_number.values()) < 8, bytes_per_number
