"""Transfer of batches to workers, and their layout inside a worker."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from localsgd_jax.core import pytrees, validation
from localsgd_jax.core.types import PyTree
from localsgd_jax.distributed import arrays
from localsgd_jax.execution.layout import Layout, axis_names, spec_divides

# Axes inside a worker that split a batch unless `batch_spec` says otherwise.
DATA_AXES = ("data", "fsdp")
# Stands for None in a `batch_spec`, since None is not a leaf of a pytree.
_DEFAULT = "default"


def shard_batch(
    layout: Layout, batch_spec: PyTree, batch: PyTree, time: bool = False
) -> PyTree:
    """Transfers a batch to the devices of the workers.

    A leaf that is on a mesh with the axes inside a worker keeps its partition over
    them; all other leaves follow `batch_spec`.

    Args:
      layout: positions of the workers.
      batch_spec: from `check_batch_spec`.
      batch: leaves `(K, B, ...)`; with several processes, arrays with all K rows or
        with the rows of the workers of this process.
      time: whether the leaves have a leading time axis, `(H, K, B, ...)`.

    Returns:
      Arrays on the devices; abstract leaves with shardings for abstract leaves.

    Raises:
      ValueError: if a leaf does not have K rows, or its size is not a multiple of the
        axes that split it.
    """
    count, axis = layout.num_workers, int(time)
    local = len(layout.local_rows(time))
    validation.check_array_leaves("shard_batch(batch)", "batch", batch)
    validation.check_worker_axis("shard_batch(batch)", batch, count, axis, local)
    shardings = _batch_shardings(layout, batch_spec, batch, axis)
    if pytrees.is_abstract(batch):
        return pytrees.with_shardings(batch, shardings)
    if layout.mesh is None or not layout.mesh.is_multi_process:
        return jax.device_put(batch, shardings)
    return jax.tree.map(
        lambda x, sharding: arrays.device_put_rows(x, sharding, count, axis),
        batch,
        shardings,
    )


def check_spec_types(call: str, batch_spec: PyTree) -> None:
    """Raises a TypeError unless each leaf is a `PartitionSpec` or None."""
    for spec in jax.tree.leaves(batch_spec):
        if not isinstance(spec, P):
            text = "it must be a PartitionSpec or a pytree of them"
            raise TypeError(f"{call}: {text}, got {validation.describe(spec)}")


def check_batch_spec(layout: Layout, batch_spec: PyTree) -> PyTree:
    """Returns the `batch_spec` of `on_mesh` for `shard_batch`.

    Args:
      layout: positions of the workers.
      batch_spec: a `PartitionSpec` of one worker's batch, a pytree prefix of such
        specs, or None.

    Returns:
      The same tree, with a placeholder for None.

    Raises:
      TypeError: if a leaf is neither a `PartitionSpec` nor None.
      ValueError: if a spec names an axis that is not inside a worker, or one twice.
    """

    check_spec_types("on_mesh(batch_spec)", batch_spec)

    def check(spec: P | None) -> P | str:
        if spec is None:
            return _DEFAULT
        names = [name for entry in spec for name in axis_names(entry)]
        inner = tuple(layout.inner_axes)
        if not set(names) <= set(inner) or len(set(names)) < len(names):
            raise ValueError(
                "on_mesh(batch_spec): it must name axes inside a worker, each once, of "
                f"{inner}, got {spec}"
            )
        return spec

    return jax.tree.map(check, batch_spec, is_leaf=lambda x: x is None)


def _batch_shardings(
    layout: Layout, batch_spec: PyTree, batch: PyTree, axis: int
) -> PyTree:
    """Returns the sharding of each leaf; None for each without a mesh."""
    if layout.mesh is None:
        return jax.tree.map(lambda _: None, batch)
    paths_and_leaves, structure = jax.tree.flatten_with_path(batch)
    specs = _broadcast_spec(batch_spec, batch, axis)
    leading = (None,) * axis + (layout.names,)
    shardings = []
    for (path, leaf), spec in zip(paths_and_leaves, specs, strict=True):
        entries = _placed_entries(layout, leaf, axis)
        if entries is None:
            entries = _host_entries(layout, path, np.shape(leaf)[axis + 1 :], spec)
        shardings.append(NamedSharding(layout.mesh, P(*leading, *entries)))
    return structure.unflatten(shardings)


def _broadcast_spec(batch_spec: PyTree, batch: PyTree, axis: int) -> list[P | str]:
    """Returns the spec of each leaf."""
    leaves, structure = jax.tree.flatten(batch)
    # Nothing is split without a batch dimension, whatever the structure of the specs.
    if all(np.ndim(x) <= axis + 1 for x in leaves):
        return [_DEFAULT] * len(leaves)
    try:
        return jax.tree.leaves(jax.tree.broadcast(batch_spec, batch))
    except ValueError as error:
        raise ValueError(
            "shard_batch(batch): batch_spec must be a pytree prefix of the batch "
            f"{structure}, got {batch_spec}"
        ) from error


def _placed_entries(layout: Layout, x: Any, axis: int) -> list[tuple] | None:
    """Returns the partition of a placed leaf inside a worker; None for other leaves."""
    inner, sharding = layout.inner_axes, getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    sizes = {name: sharding.mesh.shape.get(name) for name in inner}
    if sizes != inner:
        return None
    kept = [
        tuple(name for name in axis_names(entry) if name in inner)
        for entry in sharding.spec[axis + 1 :]
    ]
    while kept and not kept[-1]:
        kept.pop()
    return kept


def _host_entries(
    layout: Layout, path: tuple, shape: tuple[int, ...], spec: P | str
) -> list[tuple]:
    """Returns the partition of the batch of one worker, of shape `(B, ...)`."""
    inner = layout.inner_axes
    if not shape:
        return []
    if not isinstance(spec, P):
        names = tuple(name for name in inner if name in DATA_AXES)
        return [names] if names and spec_divides(P(names), shape, inner) else []
    if not spec_divides(spec, shape, inner):
        raise ValueError(
            f"shard_batch(batch): batch_spec {spec} must divide the batch of a worker "
            f"over the axes {inner}, got shape {shape} at "
            f"{jax.tree_util.keystr(path) or 'the root'}"
        )
    return [axis_names(entry) for entry in spec]
