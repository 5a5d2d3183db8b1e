"""4-bit floats against NumPy in float64, and the mean that uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.rule_arrays import K, N, random_rounds, sync_arrays
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.rules.float4_codec import float4_codec

LEVELS = np.array([0.0, *(2.0 ** (level - 7) for level in range(1, 8))])


def quantize_blocks(x, block):
    """Returns rows (…, m) rounded to the nearest E3M0 number per block, in float64."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scale = np.abs(blocks).max(-1, keepdims=True)
    relative = np.abs(blocks) / np.where(scale > 0, scale, 1)
    nearest = np.abs(relative[..., None] - LEVELS).argmin(-1)
    return (np.sign(blocks) * LEVELS[nearest] * scale).reshape(x.shape)


def round_trip(x, block=8, key=0, stochastic=False):
    codec = float4_codec(block, stochastic)
    return codec.decode(codec.encode(jnp.asarray(x, jnp.float32), jax.random.key(key)))


def test_codes_are_a_sign_and_a_level():
    """± 2^(L − 7) times the maximum of the block, and 0."""
    values = np.array([1, -0.5, 0.25, -0.125, 2.0**-6, -(2.0**-9), 0, 0.7]) * 3
    payload = float4_codec(8, False).encode(
        jnp.asarray(values, jnp.float32), jax.random.key(0)
    )
    codes = np.asarray(payload.codes).reshape(-1)
    unpacked = [*(codes & 15), *(codes >> 4)]
    assert unpacked[:4] + unpacked[4:] == [7, 14, 5, 12, 1, 8, 0, 6]
    assert payload.scales.shape == (1,) and float(payload.scales[0]) == 3


@pytest.mark.parametrize("block", [in_full(8), 256])
def test_rounds_to_the_nearest(block):
    x = np.random.default_rng(0).standard_t(2, size=(3, 512))
    np.testing.assert_allclose(
        round_trip(x, block), quantize_blocks(x, block), rtol=1e-6
    )


def test_zeros_and_representable_numbers_are_exact():
    np.testing.assert_array_equal(round_trip(np.zeros(16)), 0)
    exact = np.array([*LEVELS, *-LEVELS]) * 4
    np.testing.assert_array_equal(round_trip(exact), exact)


@pytest.mark.full
def test_stochastic_rounding_is_unbiased():
    x = np.array([1.0, 0.7, 0.3, -0.01, 0.004, -0.6, 0.2, 0])
    draws = jax.vmap(lambda key: round_trip(x, 8, key, True))(jnp.arange(4000))
    np.testing.assert_allclose(draws.mean(0), x, atol=0.02)
    assert np.ptp(np.asarray(draws), axis=0)[1] > 0


def test_quantized_mean_keeps_the_sum():
    rule = lsgd.quantize(lsgd.average(), 4, block=8, encoding="e3m0")
    rounds = random_rounds(6)
    synced, state = sync_arrays(rule, rounds)
    errors = state.local["params"]
    unsent = errors.worker_error.mean(0) + errors.server_error.sum(0)
    total = synced[:, 0].sum(0) + unsent
    np.testing.assert_allclose(total, rounds.mean(1).sum(0), atol=2e-5)
    padding = -N % (K * 8)
    sent = quantize_blocks(np.pad(rounds[0], ((0, 0), (0, padding))), 8)
    expected = quantize_blocks(sent.mean(0), 8)[:N]
    np.testing.assert_allclose(synced[0], np.tile(expected, (K, 1)), atol=1e-5)


def test_invalid_encodings_raise():
    for bits, encoding in ((8, "e3m0"), (4, "e2m1")):
        with pytest.raises(ValueError, match=r"quantize\(encoding\)"):
            lsgd.quantize(lsgd.average(), bits, encoding=encoding)
    assert "encoding='e3m0'" in lsgd.quantize(lsgd.average(), 4, encoding="e3m0").name
