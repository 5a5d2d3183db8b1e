"""Digests of arrays: independence of the layout, and detection of damage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.selection import in_full
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from localsgd_jax.checkpoint import digests

DTYPES = ["float32", "bfloat16", in_full("int32"), in_full("bool")]
DTYPES += [in_full("complex64"), in_full("float8_e4m3fn")]
LAYOUTS = [P(), P("worker", ("model", "fsdp"))]
MORE_LAYOUTS = [P("worker"), P(None, "fsdp"), P("worker", "fsdp", "model")]
MORE_LAYOUTS += [P(None, None, ("worker", "fsdp"))]


def random_array(dtype, shape=(4, 8, 12)):
    """Returns values of any bits that the dtype can hold."""
    rng = np.random.default_rng(0)
    if dtype == "complex64":
        return jnp.asarray(rng.normal(size=shape) + 1j * rng.normal(size=shape), dtype)
    numbers = rng.normal(size=shape) * 100
    return jnp.asarray(numbers > 0 if dtype == "bool" else numbers, dtype)


def mesh_of_eight():
    devices = np.array(jax.devices()[:8]).reshape(2, 2, 2)
    return Mesh(devices, ("worker", "fsdp", "model"))


def digest_of(x, has_rows=True):
    return digests.leaf_digests([x], [has_rows])[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_rows", [True, in_full(False)])
@pytest.mark.parametrize("layouts", [LAYOUTS, in_full(MORE_LAYOUTS)])
def test_digest_is_independent_of_sharding(dtype, has_rows, layouts):
    devices = mesh_of_eight()
    x = random_array(dtype)
    expected = digest_of(x, has_rows)
    assert len(set(expected)) == len(expected) == (4 if has_rows else 1)
    for spec in layouts:
        placed = jax.device_put(x, NamedSharding(devices, spec))
        assert digest_of(placed, has_rows) == expected, spec


def test_digest_needs_no_communication():
    devices = mesh_of_eight()
    sharding = NamedSharding(devices, P("worker", "fsdp", "model"))
    x = jax.device_put(random_array("float32"), sharding)
    program = digests._digest_program(x.sharding, x.shape, True)
    text = program.lower(x).compile().as_text()
    assert not any(name in text for name in ("all-", "permute", "reduce-scatter"))


@pytest.mark.parametrize(
    "dtype", ["uint8", "bool", in_full("uint16"), in_full("int4"), "uint32"]
)
def test_each_flipped_bit_changes_the_digest(dtype):
    bits = 1 if dtype == "bool" else jnp.iinfo(dtype).bits
    x = np.arange(12) % 2 ** min(bits, 3)
    variants = np.stack([x] * (12 * bits + 1)).astype(np.int64)
    for i in range(12 * bits):
        variants[i + 1, i // bits] ^= 1 << i % bits
    found = digest_of(jnp.asarray(variants).astype(dtype))
    assert len(set(found)) == len(variants)


def test_64_bit_numbers_are_two_words():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5)), jnp.float64)
        changed = (x.view(jnp.uint64).at[1, 3].add(1)).view(jnp.float64)
        before, after = digest_of(x), digest_of(changed)
    assert before[0] == after[0] and before[1] != after[1]


def damaged_rows(kind, count):
    """Returns an array and variants of it with random damage, as rows of words."""
    rng = np.random.default_rng(1)
    base = rng.integers(2**32, size=16, dtype=np.uint32)
    rows = np.tile(base, (count, 1))
    first, second = rng.integers(8, size=(2, count)) + np.array([[0], [8]])
    index = np.arange(count)
    if kind == "zeros":
        rows[first[:, None] <= np.arange(16)] = 0
        rows[index, second] = rng.integers(2**32, size=count, dtype=np.uint32)
    elif kind == "swap":
        rows[:] = rng.integers(2**32, size=rows.shape, dtype=np.uint32)
        base = rows.copy()
        rows[index, first], rows[index, second] = (
            base[index, second],
            base[index, first],
        )
    else:
        rows[index, first] = rng.integers(2**32, size=count, dtype=np.uint32)
        rows[index, second] = rng.integers(2**32, size=count, dtype=np.uint32)
    return np.broadcast_to(base, rows.shape), rows


@pytest.mark.parametrize("kind", [in_full("two words"), "swap", in_full("zeros")])
def test_damage_passes_as_rarely_as_for_random_functions(kind):
    """Of 2¹⁸ damaged rows 4 are expected to keep 8 bits of both sums."""
    base, rows = damaged_rows(kind, 2**18)
    left, right = (
        np.asarray(digests._digest(jnp.asarray(x), True, x.shape, [0, 0]))
        for x in (base, rows)
    )
    left, right = left.reshape(-1, 2), right.reshape(-1, 2)
    for shift in (0, 24):
        equal = (left >> shift & 255) == (right >> shift & 255)
        for sums in equal.T:
            assert 800 < sums.sum() < 1250, "each sum alone: 1024 expected"
        assert equal.all(1).sum() < 17


@pytest.mark.full
def test_positions_of_large_arrays_are_distinct(monkeypatch):
    """The high half numbers blocks that are larger than the low half can count."""
    monkeypatch.setattr(digests, "LOW_HALF", 8)
    for shape in ((4, 3, 2), (16,), (3, 5, 8), (2, 2, 2)):
        low, high = digests._positions(shape, shape, [0] * len(shape))
        pairs = np.stack([np.broadcast_to(x, shape).reshape(-1) for x in (low, high)])
        assert len(np.unique(pairs, axis=1).T) == np.prod(shape) or shape == (16,)
        (a, b), (c, d) = digests.POSITION_MULTIPLIERS
        assert (a * d - b * c) % 2 == 1
