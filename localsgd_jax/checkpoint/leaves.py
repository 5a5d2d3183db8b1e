"""Leaves of a state: paths, stored form, and partition of rule states."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from localsgd_jax.core.pytrees import is_key
from localsgd_jax.core.types import State
from localsgd_jax.execution.layout import axis_names


class Leaf(NamedTuple):
    """A leaf of a state.

    Attributes:
      path: field of the state and path in it, such as `workers['params']['w']`.
      value: array or `jax.ShapeDtypeStruct`, perhaps of typed PRNG keys.
      has_rows: whether the leading axis is the worker axis.
    """

    path: str
    value: Any
    has_rows: bool


def state_leaves(state: State) -> list[Leaf]:
    """Returns the leaves of a state in the order of `jax.tree.leaves`."""
    return [
        Leaf(field + jax.tree_util.keystr(path), leaf, field in ("workers", "local"))
        for field in ("step", "round", "workers", "local", "shared")
        for path, leaf in jax.tree.leaves_with_path(getattr(state, field))
    ]


def key_data(leaf: Any) -> Any:
    """Returns the key data of typed PRNG keys; other leaves unchanged."""
    if not is_key(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)
    return jax.random.key_data(leaf)


def key_impl(leaf: Any) -> Any:
    """Returns the implementation of typed PRNG keys, also of abstract ones."""
    found: list = []
    jax.eval_shape(lambda keys: found.append(jax.random.key_impl(keys)), leaf)
    return found[0]


def wrap_keys(stored: jax.Array, like: Any) -> jax.Array:
    """Wraps stored key data as typed keys if `like` has them."""
    if not is_key(like):
        return stored
    return jax.random.wrap_key_data(stored, impl=key_impl(like))


def restore_target(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns shape, dtype and sharding to which a leaf is restored.

    A leaf without a sharding is restored to the default device.
    """
    data = key_data(leaf)
    sharding = data.sharding or jnp.zeros(()).sharding
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def piece_counts(state: State) -> dict[str, dict[str, int]]:
    """Returns the axes inside a worker that order the elements of leaves.

    Such a leaf of a rule state consists of one block for each device of a worker, as
    the vectors of `core.pieces.concatenate`. A leaf with shape and partition of a leaf
    of the workers is a mirror of it, and in its order.

    Args:
      state: arrays or abstract arrays, with shardings.

    Returns:
      Sizes of the axes by the path of the leaf.
    """
    if state.specs is None:
        return {}
    mirrored = {
        (leaf.shape[1:], _canonical(spec))
        for leaf, spec in zip(
            jax.tree.leaves(state.workers), state.specs.workers, strict=True
        )
    }
    specs = [*state.specs.local, *state.specs.shared]
    leaves = [x for x in state_leaves(state) if x.path.startswith(("local", "shared"))]
    counts = {}
    for leaf, spec in zip(leaves, specs, strict=True):
        shape = leaf.value.shape[1:] if leaf.has_rows else leaf.value.shape
        canonical = _canonical(spec)
        if canonical and (shape, canonical) not in mirrored:
            sizes = _axis_sizes(leaf.value)
            counts[leaf.path] = {
                name: sizes[name] for axes in canonical for name in axes
            }
    return counts


def _canonical(spec: PartitionSpec) -> tuple[tuple, ...]:
    """Returns the axes of each entry of a spec, without empty entries at the end."""
    entries = [tuple(axis_names(entry)) for entry in spec]
    while entries and not entries[-1]:
        entries.pop()
    return tuple(entries)


def _axis_sizes(leaf: Any) -> dict[str, int]:
    """Returns the sizes of the mesh axes of a sharded leaf."""
    sharding = leaf.sharding
    return dict(sharding.mesh.shape) if isinstance(sharding, NamedSharding) else {}
