"""Merge of metrics and loss scales in the train states of workers."""

import jax
import jax.numpy as jnp

from localsgd_jax.core.types import PyTree


def is_merged_as_a_unit(node: PyTree) -> bool:
    """Returns whether the leaves of a node have no mean of their own.

    Args:
      node: a node of a train state.

    Returns:
      True for `NnxMetrics`, metrics with the methods `reduce` and `compute`, such as
      `clu.metrics.Collection`, and the `DynamicScale` of Flax.
    """
    return hasattr(node, "merge_workers") or _is_metric(node) or _is_scale(node)


def merge_unit(node: PyTree) -> PyTree:
    """Merges the workers of a node.

    Args:
      node: for which `is_merged_as_a_unit` holds, leaves `(K, ...)`.

    Returns:
      The node without worker axis: metrics of the examples of all workers, or the
      `DynamicScale` of the worker with the smallest scale.
    """
    if hasattr(node, "merge_workers"):
        return node.merge_workers()
    if _is_metric(node):
        return node.reduce()
    row = jnp.argmin(node.scale)
    return jax.tree.map(lambda x: x[row], node)


def _is_metric(node: PyTree) -> bool:
    """Returns whether a node has the methods of `clu.metrics.Metric`."""
    return all(callable(getattr(node, name, None)) for name in ("reduce", "compute"))


def _is_scale(node: PyTree) -> bool:
    """Returns whether a node is a `flax.training.dynamic_scale.DynamicScale`."""
    return type(node).__name__ == "DynamicScale" and hasattr(node, "scale")
