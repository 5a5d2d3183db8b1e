"""Trees of numbers: wider and narrower, one of two, as one vector."""

import jax
import jax.numpy as jnp

from localsgd_jax.base import PyTree


def widen(tree: PyTree) -> PyTree:
    """Casts to the dtypes in which sums are accumulated: float32 at least.

    Args:
      tree: floating point or complex leaves.

    Returns:
      A tree of the same shapes.
    """

    def wide(x: jax.Array) -> jax.Array:
        return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))

    return jax.tree.map(wide, tree)


def narrow(wide: PyTree, tree: PyTree) -> PyTree:
    """Casts back to the dtypes of a tree.

    Args:
      wide: what is cast.
      tree: gives the dtypes.

    Returns:
      A tree like the second.
    """
    return jax.tree.map(lambda w, x: w.astype(jnp.result_type(x)), wide, tree)


def choose(condition: jax.Array | bool, yes: PyTree, no: PyTree) -> PyTree:
    """Returns one of two trees; where that is known already, without a select.

    Args:
      condition: which.
      yes: if it holds.
      no: otherwise.

    Returns:
      A tree like both.
    """
    if isinstance(condition, bool):
        return yes if condition else no
    return jax.tree.map(lambda y, n: jnp.where(condition, y, n), yes, no)


def flat(tree: PyTree) -> jax.Array:
    """Joins all leaves into one vector.

    Args:
      tree: floating point leaves.

    Returns:
      `(N,)`, float32, or float64 if a leaf is.

    Example:
      >>> flat({"a": jnp.ones(2), "b": jnp.zeros((1, 1))})
      Array([1., 1., 0.], dtype=float32)
    """
    leaves = jax.tree.leaves(widen(tree))
    dtype = jnp.result_type(*leaves)
    return jnp.concatenate([x.reshape(-1).astype(dtype) for x in leaves])


def unflat(vector: jax.Array, tree: PyTree) -> PyTree:
    """Cuts a vector into the leaves of a tree.

    Args:
      vector: `(N,)`.
      tree: gives structure, shapes and dtypes.

    Returns:
      A tree like the second argument.

    Example:
      >>> unflat(jnp.arange(3.0), {"a": jnp.ones(2), "b": jnp.zeros((1, 1))})["b"]
      Array([[2.]], dtype=float32)
    """
    leaves, structure = jax.tree.flatten(tree)
    rest, cut = vector, []
    for leaf in leaves:
        cut.append(rest[: leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        rest = rest[leaf.size :]
    return structure.unflatten(cut)
