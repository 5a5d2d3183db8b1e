"""Conversion of state leaves between typed PRNG keys and stored arrays."""

from typing import Any

import jax

from localsgd_jax.execution.replication import is_key


def key_data(leaf: jax.Array) -> jax.Array:
    """Returns the key data of typed PRNG keys; other leaves unchanged."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def wrap_keys(stored: Any, like: jax.Array) -> jax.Array:
    """Wraps stored key data as typed keys if `like` has them."""
    if not is_key(like):
        return stored
    return jax.random.wrap_key_data(stored, impl=jax.random.key_impl(like))


def restore_target(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns shape, dtype and sharding to which a leaf is restored."""
    data = key_data(leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=data.sharding)
