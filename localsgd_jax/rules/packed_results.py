"""Results of different shapes from the branches of a conditional, as vectors."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from localsgd_jax.core.types import PyTree


def vector_sizes(trees: Sequence[PyTree]) -> dict[str, int]:
    """Returns the size of a vector for each dtype that holds any one of the trees.

    Args:
      trees: leaves with shapes and dtypes.

    Returns:
      Sizes by the name of the dtype.

    Example:
      >>> vector_sizes([{"a": jnp.zeros(2)}, {"b": jnp.zeros(3), "n": jnp.int32(0)}])
      {'float32': 3, 'int32': 1}
    """
    sizes: dict[str, int] = {}
    for tree in trees:
        for name, leaves in _by_dtype(tree).items():
            size = sum(math.prod(jnp.shape(leaf)) for leaf in leaves)
            sizes[name] = max(sizes.get(name, 0), size)
    return sizes


def pack(tree: PyTree, sizes: dict[str, int]) -> dict[str, jax.Array]:
    """Concatenates the leaves of each dtype, zero-padded to the given sizes.

    Args:
      tree: arrays.
      sizes: from `vector_sizes`.

    Returns:
      Vectors by the name of the dtype.
    """
    leaves = _by_dtype(tree)

    def concatenate(name: str, size: int) -> jax.Array:
        vectors = [leaf.reshape(-1) for leaf in leaves.get(name, [])]
        padding = size - sum(vector.size for vector in vectors)
        zeros = [jnp.zeros(padding, name)] if padding else []
        return jnp.concatenate(vectors + zeros)

    return {name: concatenate(name, size) for name, size in sizes.items()}


def unpack(vectors: dict[str, jax.Array], like: PyTree) -> PyTree:
    """Inverts `pack`.

    Args:
      vectors: from `pack`.
      like: gives structure, shapes and dtypes.

    Returns:
      A tree with the structure of `like`.
    """
    starts = dict.fromkeys(vectors, 0)

    def read(leaf: jax.Array) -> jax.Array:
        name, size = leaf.dtype.name, math.prod(leaf.shape)
        start = starts[name]
        starts[name] = start + size
        return vectors[name][start : start + size].reshape(leaf.shape)

    return jax.tree.map(read, like)


def _by_dtype(tree: PyTree) -> dict[str, list[jax.Array]]:
    """Groups the leaves of a tree by the name of their dtype."""
    groups: dict[str, list[jax.Array]] = {}
    for leaf in map(jnp.asarray, jax.tree.leaves(tree)):
        groups.setdefault(leaf.dtype.name, []).append(leaf)
    return groups
