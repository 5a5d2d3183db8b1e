"""Placement of parameters on a mesh, by their sharding or their metadata."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from localsgd_jax.core.types import Algorithm, PyTree
from localsgd_jax.distributed.arrays import device_put_global
from localsgd_jax.execution.layout import Layout, axis_names, spec_divides


def shard_params(algorithm: Algorithm, layout: Layout, params: PyTree) -> PyTree:
    """Places the parameters of one worker on the automatic mesh of a layout.

    A leaf that is split over axes inside a worker keeps its sharding. Another leaf
    with partitioning metadata, such as a box of Flax, is split by it. All others are
    unchanged.

    Args:
      algorithm: `partition_specs` gives the metadata of its parameters.
      layout: positions of the workers.
      params: arrays or abstract arrays, of one worker.

    Returns:
      The parameters, with the same structure and values.

    Raises:
      ValueError: if metadata name an axis that is not inside a worker, or do not
        divide a leaf.
    """
    if layout.mesh is None:
        return params
    specs = (algorithm.partition_specs or boxed_specs)(params)
    paths_and_leaves, structure = jax.tree.flatten_with_path(params)
    return structure.unflatten(
        _shard_leaf(layout, path, leaf, spec)
        for (path, leaf), spec in zip(paths_and_leaves, specs, strict=True)
    )


def boxed_specs(params: PyTree) -> list[P | None]:
    """Returns the partition of each leaf by the box around it.

    A box is a pytree node with a method `get_partition_spec`, as in Flax.

    Args:
      params: leaves, boxed or not.

    Returns:
      A `PartitionSpec`, or None for a leaf without a box, in the order of the leaves.
    """
    specs: list[P | None] = []
    for node in jax.tree.leaves(params, is_leaf=_is_box):
        spec = node.get_partition_spec() if _is_box(node) else None
        specs += [spec] * len(jax.tree.leaves(node))
    return specs


def _shard_leaf(layout: Layout, path: tuple, x: Any, spec: P | None) -> Any:
    """Places one leaf."""
    sharding, inner = getattr(x, "sharding", None), layout.inner_axes
    placed = sharding.spec if isinstance(sharding, NamedSharding) else None
    if placed is not None and set(inner) & _names(placed):
        return _put(layout, x, placed)
    if spec is None or not inner or not _names(spec):
        return x if placed is None else _put(layout, x, placed)
    where = jax.tree_util.keystr(path) or "the root"
    if unknown := _names(spec) - set(inner):
        raise ValueError(
            "init(params): partitioning metadata must name axes inside a worker, "
            f"{tuple(inner)}, got {sorted(unknown)[0]!r} at {where}; logical names "
            "need flax.linen.logical_axis_rules around from_linen or from_nnx"
        )
    if not spec_divides(spec, np.shape(x), inner):
        raise ValueError(
            f"init(params): partitioning metadata {spec} must divide the leaf over the "
            f"axes {inner}, got shape {np.shape(x)} at {where}"
        )
    return _put(layout, x, spec)


def _put(layout: Layout, x: Any, spec: P) -> Any:
    """Puts a leaf onto the automatic mesh, with the part of a spec inside a worker."""
    entries = [
        tuple(name for name in axis_names(entry) if name in layout.inner_axes)
        for entry in spec
    ]
    while entries and not entries[-1]:
        entries.pop()
    sharding = layout.inner_sharding(P(*entries))
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return device_put_global(x, sharding)


def _names(spec: P) -> set[str]:
    """Returns all mesh axes in a spec."""
    return {name for entry in spec for name in axis_names(entry)}


def _is_box(x: object) -> bool:
    """Returns whether a pytree node has partitioning metadata."""
    return hasattr(x, "get_partition_spec")
