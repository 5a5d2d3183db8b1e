"""Collectives over worker axes.

A worker axis may be carried by a mesh axis, by a vmap axis over the workers of one
device (lanes), or by both. Every collective is applied to one carrier after the other.
With `core.pieces`, for axes inside a worker, the only module that uses the collectives
of `jax.lax`. Workers are numbered 0 to n − 1 in the order of the axes, outermost first.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
from optax.tree_utils import tree_cast_like

from localsgd_jax.core.buckets import map_buckets
from localsgd_jax.core.pytrees import promote
from localsgd_jax.core.types import PyTree, SyncContext, VmapAxis

Axis = str | Sequence[str] | None


def mean(
    tree: PyTree, context: SyncContext, axis: Axis = None
) -> tuple[PyTree, jax.Array | bool]:
    """Averages each leaf over workers, accumulated in float32 at least.

    With the weights wₖ ≥ 0 of the context (1 for all if it has none):

        x̄ = Σₖ wₖ xₖ / Σₖ wₖ

    A worker of weight 0 has no influence even if its leaves are not finite. Over an
    outer axis, such as "pod" of `("pod", "worker")`, the mean is over groups; the
    workers of a group must be equal, and the weight of a group is the sum of their
    weights.

    Args:
      tree: pytree of floating point or complex leaves.
      context: context of the calling rule.
      axis: worker axis, or several; None for all.

    Returns:
      The mean in the dtypes of `tree`, and whether any weight is positive, a boolean
      scalar that is equal on all averaged workers. If no weight is positive the mean
      is 0.

    Raises:
      ValueError: if the axis is not a worker axis.
    """
    axis_names = _carriers(context, _resolve_axes(context, axis))
    promoted = promote(tree)
    if context.weight is None:
        count = size(context, axis)
        summed = _psum_in_buckets(promoted, axis_names, context)
        averaged = jax.tree.map(lambda x: x / count, summed)
        return tree_cast_like(averaged, tree), True
    weight = _group_weight(context.weight, context, axis)
    weighted = jax.tree.map(
        lambda x: jnp.where(weight > 0, x * weight.astype(x.dtype), 0), promoted
    )
    summed = _psum_in_buckets(weighted, axis_names, context)
    total = _psum(weight, axis_names)
    any_active = total > 0
    divisor = jnp.where(any_active, total, 1)
    averaged = jax.tree.map(lambda x: x / divisor.astype(x.dtype), summed)
    return tree_cast_like(averaged, tree), any_active


def any_participants(context: SyncContext) -> tuple[jax.Array | bool, SyncContext]:
    """Tests for a positive weight; returns a context that has one.

    If all weights are 0 they become 1 in the returned context, so that an inner rule is
    well defined; the caller discards its result.

    Args:
      context: context of the calling rule.

    Returns:
      A boolean scalar that is equal on all workers, and the context.
    """
    weight = context.weight
    if weight is None:
        return True, context
    any_active = _psum(weight, _carriers(context, tuple(context.axes))) > 0
    return any_active, context._replace(weight=jnp.where(any_active, weight, 1))


def assume_replicated(tree: PyTree) -> PyTree:
    """Declares a tree equal on all workers where JAX cannot infer it.

    Has no runtime cost and checks nothing: the caller must guarantee equal values.

    Args:
      tree: any pytree.

    Returns:
      The tree as a single copy.
    """
    return _first_copy(_MAX_VMAP_AXES)(tree)


def assume_replicated_within(
    tree: PyTree, context: SyncContext, axis: Axis = None
) -> PyTree:
    """Declares a tree equal on all workers of a group.

    Args:
      tree: any pytree.
      context: context of the calling rule.
      axis: worker axis over which groups are synchronised; the groups themselves
        extend along the axes inside it.

    Returns:
      The tree as one copy for each group.
    """
    return _first_copy(len(_inner_axes(context, _resolve_axes(context, axis))))(tree)


def num_differing_axes(tree: PyTree, context: SyncContext) -> int | None:
    """Returns over how many worker axes, from the outermost on, a tree may differ.

    JAX knows for each vmap axis whether a value depends on it. On a mesh the innermost
    worker axis has a vmap axis over its lanes.

    Args:
      tree: any pytree.
      context: context of the calling rule.

    Returns:
      A number from 0 to the number of worker axes; None outside of a cluster, where no
      axis is a vmap axis.
    """
    carriers = [name for names in context.axes.values() for name in names]
    num_vmap_axes = sum(isinstance(name, VmapAxis) for name in carriers)
    if num_vmap_axes == 0:
        return None
    is_mapped: list[bool] = []
    _make_first_copy(num_vmap_axes, is_mapped.append)(tree)
    return len(context.axes) - (num_vmap_axes - sum(is_mapped))


_MAX_VMAP_AXES = 8  # More nested vmap axes over workers do not occur.


@cache
def _first_copy(depth: int) -> Callable:
    """Returns a function that removes equal copies along `depth` vmap axes."""
    return _make_first_copy(depth, lambda is_mapped: None)


def _make_first_copy(depth: int, record: Callable[[bool], None]) -> Callable:
    """Makes a function that keeps the first copy along each of `depth` vmap axes.

    Args:
      depth: number of vmap axes.
      record: called for each vmap axis of the tree, with whether a leaf has it.

    Returns:
      A function of a tree.
    """
    if depth == 0:
        return lambda tree: tree

    @jax.custom_batching.custom_vmap
    def first(tree: PyTree) -> PyTree:
        return tree

    @first.def_vmap
    def _(size: int, batched: list, tree: PyTree) -> tuple[PyTree, PyTree]:
        del size
        record(any(jax.tree.leaves(batched[0])))
        copy = jax.tree.map(lambda x, mapped: x[0] if mapped else x, tree, batched[0])
        out_batched = jax.tree.map(lambda mapped: False, batched[0])
        return _make_first_copy(depth - 1, record)(copy), out_batched

    return first


def size(context: SyncContext, axis: Axis = None) -> int:
    """Returns n, the number of workers along an axis.

    Args:
      context: context of the calling rule.
      axis: worker axis, or several; None for all.

    Returns:
      A Python int.
    """
    axis_names = _carriers(context, _resolve_axes(context, axis))
    return math.prod(map(jax.lax.axis_size, axis_names))


def index(context: SyncContext, axis: Axis = None) -> jax.Array:
    """Returns the index of this worker along an axis.

    Args:
      context: context of the calling rule.
      axis: worker axis, or several; None for all.

    Returns:
      An int32 scalar, 0 to n − 1.
    """
    position = jnp.int32(0)
    for name in _carriers(context, _resolve_axes(context, axis)):
        position = position * jax.lax.axis_size(name) + jax.lax.axis_index(name)
    return position


def psum(tree: PyTree, context: SyncContext, axis: Axis = None) -> PyTree:
    """Sums each leaf over workers, without weights.

        Σₖ xₖ

    Args:
      tree: pytree of numbers.
      context: context of the calling rule.
      axis: worker axis, or several; None for all.

    Returns:
      The sum.
    """
    return _psum(tree, _carriers(context, _resolve_axes(context, axis)))


def all_gather(tree: PyTree, context: SyncContext, axis: Axis = None) -> PyTree:
    """Gathers the trees of all workers on every worker.

    Args:
      tree: any pytree of arrays.
      context: context of the calling rule.
      axis: worker axis, or several; None for all.

    Returns:
      Leaves `(n, ...)`; row k comes from worker k.
    """
    axis_names = _carriers(context, _resolve_axes(context, axis))

    def gather(x: jax.Array) -> jax.Array:
        shape = jnp.shape(x)
        for name in reversed(axis_names):
            x = jax.lax.all_gather(x, name)
        return x.reshape(size(context, axis), *shape)

    return jax.tree.map(gather, tree)


def all_to_all(rows: PyTree, context: SyncContext, axis: Axis = None) -> PyTree:
    """Sends row j of every worker to worker j.

    Args:
      rows: leaves `(n, ...)`.
      context: context of the calling rule.
      axis: worker axis, or several; None for all.

    Returns:
      Leaves `(n, ...)`; row i comes from worker i.
    """
    axis_names = _carriers(context, _resolve_axes(context, axis))
    sizes = [jax.lax.axis_size(name) for name in axis_names]

    def exchange(x: jax.Array) -> jax.Array:
        # The batching rule of all-to-all reads an unbatched operand, equal on all
        # lanes, as the operand of a single lane. The select makes it batched.
        batched = jnp.where(index(context, axis) >= 0, x, x)
        grid = batched.reshape(*sizes, *x.shape[1:])
        for i, name in enumerate(axis_names):
            grid = jax.lax.all_to_all(grid, name, i, i)
        return grid.reshape(x.shape)

    return jax.tree.map(exchange, rows)


def reduce_scatter(
    rows: jax.Array, context: SyncContext, axis: Axis = None
) -> jax.Array:
    """Sums rows over workers; worker j receives row j of the sum.

    Args:
      rows: `(n, ...)`.
      context: context of the calling rule.
      axis: worker axis, or several; None for all.

    Returns:
      One row, `(...)`.
    """
    axis_names = _carriers(context, _resolve_axes(context, axis))
    rows = rows.reshape(*map(jax.lax.axis_size, axis_names), *rows.shape[1:])
    for name in axis_names:
        rows = jax.lax.psum_scatter(rows, name)
    return rows


def shift(tree: PyTree, offset: int, context: SyncContext, axis: Axis = None) -> PyTree:
    """Sends the tree of each worker to the worker `offset` positions further.

        yₖ = x₍ₖ₋ₛ₎,   counted modulo n

    Args:
      tree: any pytree of arrays.
      offset: s.
      context: context of the calling rule.
      axis: worker axis, or several; None for all.

    Returns:
      A tree with the structure and shapes of `tree`.
    """
    axis_names = _carriers(context, _resolve_axes(context, axis))
    return jax.tree.map(lambda x: _shift(x, axis_names, offset), tree)


def gathered_weights(context: SyncContext, axis: Axis = None) -> jax.Array:
    """Gathers the weights of all workers on every worker.

    Args:
      context: context of the calling rule.
      axis: worker axis, or several; None for all.

    Returns:
      `(n,)`, float32 at least; ones if the context has no weights.
    """
    if context.weight is None:
        return jnp.ones(size(context, axis))
    weight = _group_weight(context.weight, context, axis)
    return all_gather(weight, context, axis)


def is_active(context: SyncContext, axis: Axis = None) -> jax.Array | bool:
    """Returns whether the weight of this worker's group is positive.

    Args:
      context: context of the calling rule.
      axis: worker axis, or several, over which groups are averaged, as in `mean`; with
        None each worker is a group.

    Returns:
      True if the context has no weights, otherwise a bool scalar that is equal on all
      workers of the group.
    """
    if context.weight is None:
        return True
    return _group_weight(context.weight, context, axis) > 0


def _group_weight(
    weight: jax.Array, context: SyncContext, axis: Axis = None
) -> jax.Array:
    """Returns the sum of the weights of this worker's group.

    A group extends along the axes inside `axis`; over the innermost axis it is the
    worker alone. The sum is equal on all workers of the group.
    """
    inner = _carriers(context, _inner_axes(context, _resolve_axes(context, axis)))
    return _psum(promote(jnp.asarray(weight)), inner)


def _psum(tree: PyTree, axis_names: tuple[str, ...]) -> PyTree:
    """Sums over the lanes of each device, then over mesh axes."""
    tree, mesh_axes = _psum_lanes(tree, axis_names)
    return jax.lax.psum(tree, mesh_axes) if mesh_axes else tree


def _psum_in_buckets(
    tree: PyTree, axis_names: tuple[str, ...], context: SyncContext
) -> PyTree:
    """Sums as `_psum`; over mesh axes small leaves are concatenated."""
    tree, mesh_axes = _psum_lanes(tree, axis_names)
    if not mesh_axes:
        return tree
    return map_buckets(lambda tree: jax.lax.psum(tree, mesh_axes), tree, context)


def _psum_lanes(
    tree: PyTree, axis_names: tuple[str, ...]
) -> tuple[PyTree, tuple[str, ...]]:
    """Sums over the lanes of each device; returns the sum and the mesh axes."""
    vmap_axes = [name for name in axis_names if isinstance(name, VmapAxis)]
    for name in vmap_axes:
        tree = jax.tree.map(partial(_psum_vmapped, name), tree)
    return tree, tuple(name for name in axis_names if name not in vmap_axes)


def _psum_vmapped(name: str, x: jax.Array) -> jax.Array:
    """Sums over a vmap axis by a product with ones.

    Workaround: row sums of XLA:CPU are ten times slower than a matrix product before
    JAX 0.12.
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return jax.lax.psum(x, name)
    rows = jax.lax.all_gather(x, name)  # Lanes share a device: nothing is sent.
    ones = jnp.ones(rows.shape[0], rows.dtype)
    return jnp.tensordot(ones, rows, axes=1, precision="highest")


def _shift(x: jax.Array, axis_names: tuple[str, ...], offset: int) -> jax.Array:
    """Shifts along the innermost axis, with a carry into the outer axes."""
    offset %= math.prod(map(jax.lax.axis_size, axis_names))
    if offset == 0:
        return x
    *outer, name = axis_names
    count = jax.lax.axis_size(name)
    blocks, within = divmod(offset, count)
    if within:
        x = jax.lax.ppermute(x, name, [(i, (i + within) % count) for i in range(count)])
    same_block = _shift(x, tuple(outer), blocks)
    if not within or not outer:
        return same_block
    next_block = _shift(x, tuple(outer), blocks + 1)
    return jnp.where(jax.lax.axis_index(name) < within, next_block, same_block)


def _resolve_axes(context: SyncContext, axis: Axis) -> tuple[str, ...]:
    """Returns the worker axes named by an `axis` argument."""
    if axis is None:
        return tuple(context.axes)
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    for name in names:
        if name not in context.axes:
            raise ValueError(
                f"rule(axis={axis!r}): every axis must be a worker axis of "
                f"{tuple(context.axes)}, got {name!r}"
            )
    return names


def _inner_axes(context: SyncContext, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the worker axes inside the innermost of the given ones."""
    order = list(context.axes)
    return tuple(order[max(map(order.index, names), default=-1) + 1 :])


def _carriers(context: SyncContext, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the mesh and vmap axes that carry worker axes."""
    return tuple(carrier for name in names for carrier in context.axes[name])
