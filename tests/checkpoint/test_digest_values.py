"""Digests of arrays: fixed values, and different keys for different positions."""

import jax.numpy as jnp

from localsgd_jax.checkpoint.digests import (
    POSITION_MULTIPLIERS,
    json_digest,
    leaf_digests,
)
from localsgd_jax.checkpoint.errors import first_line


def test_digests_stay_the_same():
    """Checkpoints of earlier versions store these digests."""
    rows = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    assert leaf_digests([rows, jnp.arange(3)], [True, False]) == [
        ["32e2c8261cd4dd40", "1c19a36e6147583b"],
        ["3747be95ef092151"],
    ]


def test_positions_have_different_keys():
    """The map from a position to its two keys is invertible modulo 2³²."""
    (a, b), (c, d) = POSITION_MULTIPLIERS
    assert (a * d - b * c) % 2 == 1


def test_reason_of_damage_is_short():
    assert first_line(ValueError("first\nsecond")) == "ValueError: first"
    assert len(first_line(ValueError("x" * 300))) == 200


def test_digests_of_complex_arrays_stay_the_same():
    rows = jnp.arange(6, dtype=jnp.float32).reshape(1, 2, 3)
    assert leaf_digests([rows + 1j * rows**2], [True]) == [["cf8f6d6742ab97cf"]]


def test_digest_of_metadata_is_independent_of_the_order_of_names():
    assert json_digest({"a": 1, "b": [2]}) == json_digest({"b": [2], "a": 1})
    assert json_digest({"a": 1, "b": [2]}) != json_digest({"a": 1, "b": [3]})
