"""Trees of shapes in place of arrays, for programs that are compiled and not run."""

import jax

from localsgd_jax.base import PyTree


def abstract(tree: PyTree) -> bool:
    """Returns whether a tree has shapes for leaves instead of arrays."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def placed(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns the shapes of a tree, with shardings."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def like(tree: PyTree, params: PyTree) -> PyTree:
    """Shards what has a parameter's shape, such as a moment, as that parameter is."""
    known = {x.shape: getattr(x, "sharding", None) for x in jax.tree.leaves(params)}
    return placed(tree, jax.tree.map(lambda x: known.get(x.shape), tree))
