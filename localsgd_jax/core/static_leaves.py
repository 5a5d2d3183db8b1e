"""Leaves of a train state that are no arrays, such as functions and strings."""

from typing import Any

import jax
import numpy as np

from localsgd_jax.core.types import PyTree


@jax.tree_util.register_static
class StaticLeaf:
    """A value in the structure of a tree, in place of a leaf.

    Attributes:
      value: any object that is not an array.
    """

    def __init__(self, value: Any) -> None:
        """Stores the value."""
        self.value = value

    def __eq__(self, other: object) -> bool:
        """Compares type and value."""
        if not isinstance(other, StaticLeaf):
            return False
        value, other_value = self.value, other.value
        has_type = type(value) is type(other_value)
        return value is other_value or (has_type and bool(value == other_value))

    def __hash__(self) -> int:
        """Returns the hash of the value, or of its type."""
        try:
            return hash(self.value)
        except TypeError:
            return hash(type(self.value))

    def __repr__(self) -> str:
        """Returns that of the value."""
        return repr(self.value)


def mark_static(tree: PyTree) -> PyTree:
    """Replaces each leaf that is not an array by a `StaticLeaf`.

    Args:
      tree: any pytree, such as a module with functions as leaves.

    Returns:
      A tree whose leaves are arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> jax.tree.leaves(mark_static({"w": jnp.ones(2), "activation": jnp.tanh}))
      [Array([1., 1.], dtype=float32)]
    """
    return jax.tree.map(lambda x: x if _is_array(x) else StaticLeaf(x), tree)


def restore_static(tree: PyTree) -> PyTree:
    """Inverts `mark_static`.

    Args:
      tree: result of `mark_static`, perhaps with other arrays.

    Returns:
      The tree with all leaves.
    """
    return jax.tree.map(
        lambda x: x.value if _is_static(x) else x, tree, is_leaf=_is_static
    )


def _is_static(x: object) -> bool:
    """Returns whether a node is a `StaticLeaf`."""
    return isinstance(x, StaticLeaf)


def _is_array(x: object) -> bool:
    """Returns whether a leaf is an array, concrete or abstract."""
    kinds = jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct
    return isinstance(x, kinds)
