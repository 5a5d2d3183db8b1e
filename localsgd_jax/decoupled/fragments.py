"""Fragments of a model: groups of complete leaves with about equal bytes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from localsgd_jax.core.pytrees import promote
from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check
from localsgd_jax.rules.streaming import assign_fragments

Fragment = dict[str, jax.Array]


def num_fragments(call: str, params: PyTree, count: int) -> None:
    """Raises unless each fragment gets a leaf and all leaves are real.

    Args:
      call: public call and argument for the message.
      params: the model.
      count: number of fragments.

    Raises:
      TypeError: if a leaf is not floating point.
      ValueError: if there are more fragments than leaves.
    """
    leaves = jax.tree.leaves_with_path(params)
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"Job(params): every leaf must be floating point, got "
                f"{jnp.result_type(leaf)} at {jax.tree_util.keystr(path)}"
            )
    text = f"it must be at most the {len(leaves)} leaves of the model"
    check(count <= len(leaves), call, text, count)


def split(params: PyTree, count: int) -> list[Fragment]:
    """Splits a model into fragments.

    Args:
      params: the model.
      count: number of fragments.

    Returns:
      Leaves by path, for each fragment.

    Example:
      >>> tree = {"a": jnp.zeros(5), "b": jnp.zeros(3), "c": jnp.zeros(2)}
      >>> [sorted(fragment) for fragment in split(tree, 2)]
      [["['a']"], ["['b']", "['c']"]]
    """
    leaves = [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
    ]
    return [
        dict(leaves[part.leaf] for part in group)
        for group in assign_fragments(params, count)
    ]


def join(params: PyTree, *fragments: Mapping[str, Any]) -> PyTree:
    """Replaces leaves of a model by the leaves of fragments.

    Args:
      params: the model.
      *fragments: leaves by path.

    Returns:
      A model with the structure and dtypes of `params`.
    """
    leaves = {path: leaf for fragment in fragments for path, leaf in fragment.items()}

    def replace(path: tuple, leaf: jax.Array) -> jax.Array:
        new = leaves.get(jax.tree_util.keystr(path), leaf)
        return jnp.asarray(new, jnp.result_type(leaf))

    return jax.tree.map_with_path(replace, params)


def difference(params: Fragment, last_read: Fragment) -> Fragment:
    """Returns x − r in float32 or wider."""
    return jax.tree.map(jnp.subtract, promote(params), promote(last_read))
