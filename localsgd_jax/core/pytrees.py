"""Pytree operations: promotion to float32, selection, raveling and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from localsgd_jax.core.types import PyTree


def promote(tree: PyTree) -> PyTree:
    """Casts leaves to the accumulation dtype, which is at least float32.

    The inverse is `optax.tree_utils.tree_cast_like(promoted, tree)`.

    Args:
      tree: floating point or complex leaves.

    Returns:
      A tree with the same structure and shapes.

    Example:
      >>> promote({"w": jnp.ones(2, jnp.bfloat16)})["w"].dtype
      dtype('float32')
    """

    return jax.tree.map(lambda x: jnp.asarray(x, accumulation_dtype(x)), tree)


def accumulation_dtype(x: jax.typing.ArrayLike) -> jnp.dtype:
    """Returns the dtype for accumulating means and sums of an array.

    It is float32, or the dtype of the array if that is wider or complex.
    """
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def where(condition: jax.Array | bool, yes: PyTree, no: PyTree) -> PyTree:
    """Selects one of two trees by a scalar condition.

    Unlike `optax.tree_utils.tree_where` it adds no operation to the program if the
    condition is a Python bool.

    Args:
      condition: Python bool or scalar boolean array.
      yes: result if the condition is true.
      no: result if it is false; structure and shapes as in `yes`.

    Returns:
      A tree with the structure of both.
    """
    if isinstance(condition, bool):
        return yes if condition else no
    return jax.tree.map(lambda y, n: jnp.where(condition, y, n), yes, no)


def ravel(tree: PyTree) -> jax.Array:
    """Concatenates all leaves into one promoted vector.

    Args:
      tree: floating point leaves with N elements in total.

    Returns:
      `(N,)`, float32, or float64 if a leaf is float64.

    Example:
      >>> ravel({"a": jnp.ones(2), "b": jnp.zeros((1, 1))})
      Array([1., 1., 0.], dtype=float32)
    """
    return ravel_pytree(promote(tree))[0]


def unravel(vector: jax.Array, tree: PyTree) -> PyTree:
    """Reshapes a vector into the leaves of a tree.

    Args:
      vector: `(N,)`, as from `ravel(tree)`.
      tree: gives structure, shapes and dtypes.

    Returns:
      A tree with the structure, shapes and dtypes of `tree`.

    Example:
      >>> unravel(jnp.arange(3.0), {"a": jnp.ones(2), "b": jnp.zeros((1, 1))})["b"]
      Array([[2.]], dtype=float32)
    """
    like, structure = jax.tree.flatten(tree)
    remaining, leaves = vector, []
    for leaf in like:
        leaves.append(remaining[: leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        remaining = remaining[leaf.size :]
    return structure.unflatten(leaves)


def stack_leaves(*trees: PyTree) -> PyTree:
    """Stacks the leaves of several trees along a new leading axis.

    NumPy arrays are stacked on the host, JAX arrays on their device.

    Args:
      *trees: trees of equal structure, shapes and kind of array.

    Returns:
      A tree with leaves `(N, ...)` for N trees.

    Example:
      >>> stack_leaves({"x": np.ones(2)}, {"x": np.zeros(2)})["x"].shape
      (2, 2)
    """

    def stack(*leaves: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        return (jnp if isinstance(leaves[0], jax.Array) else np).stack(leaves)

    return jax.tree.map(stack, *trees)


def is_traced(x: object) -> bool:
    """Returns whether a value is traced by a JAX transformation.

    A traced value has a shape and a dtype, but no concrete elements.
    """
    return isinstance(x, Tracer)


def is_key(x: jax.Array) -> bool:
    """Returns whether a leaf is an array of typed PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_abstract(tree: PyTree) -> bool:
    """Returns whether any leaf is a `jax.ShapeDtypeStruct`.

    Abstract trees stand for arrays in programs that are compiled and not run.
    """
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def with_shardings(tree: PyTree, shardings: PyTree) -> PyTree:
    """Converts leaves to `jax.ShapeDtypeStruct` with the given shardings.

    Args:
      tree: leaves with a shape and a dtype.
      shardings: a sharding, or None, for each leaf.

    Returns:
      An abstract tree with the structure of `tree`.
    """
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def split_rows(vector: jax.Array, rows: int, block_size: int = 1) -> jax.Array:
    """Splits a vector into equal rows of whole blocks, zero-padded at the end.

    Args:
      vector: `(N,)`.
      rows: number of rows, K.
      block_size: number of consecutive entries that stay in one row.

    Returns:
      `(K, m)`, m a multiple of `block_size`.

    Example:
      >>> split_rows(jnp.arange(1, 4), 2)
      Array([[1, 2],
             [3, 0]], dtype=int32)
    """
    padding = -vector.size % (rows * block_size)
    return jnp.pad(vector, (0, padding)).reshape(rows, -1)


def join_rows(rows: jax.Array, size: int) -> jax.Array:
    """Joins the rows of `split_rows` and removes the padding.

    Args:
      rows: `(K, m)`.
      size: N, the length of the vector that was split.

    Returns:
      `(N,)`.
    """
    return rows.reshape(-1)[:size]
