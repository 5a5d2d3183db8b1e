"""Where workers talk: the only file that names a `jax.lax` collective.

Workers that share a device are lanes: an axis of workers is carried by a mesh axis and
an axis of lanes, and every exchange goes over one carrier after the other. Workers are
counted 0 to n − 1 in the order of the axes, outermost first.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp

from localsgd_jax.base import Context, Lane, PyTree
from localsgd_jax.trees import narrow, widen

Axis = str | Sequence[str] | None


def mean(
    tree: PyTree, context: Context, axis: Axis = None
) -> tuple[PyTree, jax.Array | bool]:
    """Averages each leaf over workers, in float32 at least.

    With the weights wₖ ≥ 0 of the context (1 for all if it has none):

        x̄ = Σₖ wₖ xₖ / Σₖ wₖ

    A worker of weight 0 has no influence even if its leaves are not finite. Over an
    outer axis, such as "pod" of `("pod", "worker")`, groups are averaged that have
    agreed within: each weighs what its workers weigh together.

    Args:
      tree: pytree of floating point or complex leaves.
      context: of the rule that asks.
      axis: worker axis, or several; None for all.

    Returns:
      The mean in the dtypes of `tree`, and whether any weight is positive: a bool
      scalar that is the same for all who are averaged; without one the mean is 0.

    Raises:
      ValueError: if the workers live on no such axis.
    """
    names = _names(context, axis)
    carriers = _carriers(context, names)
    wide = widen(tree)
    if context.weight is None:
        count = size(context, axis)
        return narrow(
            jax.tree.map(lambda x: _sum(x, carriers) / count, wide), tree
        ), True
    share = group_weight(context, axis)
    parts = jax.tree.map(
        lambda x: jnp.where(share > 0, x * share.astype(x.dtype), 0), wide
    )
    summed, total = _sum((parts, share), carriers)
    anyone = total > 0
    total = jnp.where(anyone, total, 1)
    averaged = jax.tree.map(lambda x: x / total.astype(x.dtype), summed)
    return narrow(averaged, tree), anyone


def present(context: Context) -> tuple[jax.Array | bool, Context]:
    """Returns whether anyone takes part, and a context in which somebody does.

    Where all weights are 0 the new ones are 1, so that a rule within has something to
    agree on; the caller throws it away.

    Args:
      context: of the rule that asks.

    Returns:
      A bool scalar that is the same for all workers, and the context.
    """
    weight = context.weight
    if weight is None:
        return True, context
    anyone = _sum(weight, _carriers(context, tuple(context.axes))) > 0
    return anyone, context._replace(weight=jnp.where(anyone, weight, 1))


def equal(tree: PyTree) -> PyTree:
    """Declares that a tree is the same for all workers where the program cannot see it.

    It costs nothing and proves nothing: use it only where the equation says so.

    Args:
      tree: any pytree.

    Returns:
      The tree, as one copy.
    """
    return _one_copy(_ALL)(tree)


def equal_within(tree: PyTree, context: Context, axis: Axis = None) -> PyTree:
    """Declares that a tree is the same for all workers of a group.

    Args:
      tree: any pytree.
      context: of the rule that asks.
      axis: over which groups meet: what has agreed within are the axes inside it.

    Returns:
      The tree, as one copy for each group.
    """
    return _one_copy(len(_inside(context, _names(context, axis))))(tree)


_ALL = 8  # More axes of lanes than anyone has.


@cache
def _one_copy(depth: int) -> Callable:
    """Makes the function that takes the first of equal trees in the inner axes."""
    if depth == 0:
        return lambda tree: tree

    @jax.custom_batching.custom_vmap
    def first(tree: PyTree) -> PyTree:
        return tree

    @first.def_vmap
    def _(size: int, batched: list, tree: PyTree) -> tuple[PyTree, PyTree]:
        del size
        one = jax.tree.map(lambda x, many: x[0] if many else x, tree, batched[0])
        none = jax.tree.map(lambda many: False, batched[0])
        return _one_copy(depth - 1)(one), none

    return first


def size(context: Context, axis: Axis = None) -> int:
    """Returns n, the number of workers on an axis.

    Args:
      context: of the rule that asks.
      axis: worker axis, or several; None for all.

    Returns:
      A Python int.
    """
    return math.prod(map(jax.lax.axis_size, _carriers(context, _names(context, axis))))


def index(context: Context, axis: Axis = None) -> jax.Array:
    """Returns which of the n workers on an axis this one is.

    Args:
      context: of the rule that asks.
      axis: worker axis, or several; None for all.

    Returns:
      An int32 scalar.
    """
    place = jnp.int32(0)
    for name in _carriers(context, _names(context, axis)):
        place = place * jax.lax.axis_size(name) + jax.lax.axis_index(name)
    return place


def total(tree: PyTree, context: Context, axis: Axis = None) -> PyTree:
    """Adds up each leaf over workers, whatever their weights.

        Σₖ xₖ

    Args:
      tree: pytree of numbers.
      context: of the rule that asks.
      axis: worker axis, or several; None for all.

    Returns:
      The sum.
    """
    return _sum(tree, _carriers(context, _names(context, axis)))


def gather(tree: PyTree, context: Context, axis: Axis = None) -> PyTree:
    """Gives everyone the trees of all.

    Args:
      tree: any pytree of arrays.
      context: of the rule that asks.
      axis: worker axis, or several; None for all.

    Returns:
      Leaves `(n, ...)`, a row for each worker.
    """
    carriers = _carriers(context, _names(context, axis))

    def rows(x: jax.Array) -> jax.Array:
        shape = jnp.shape(x)
        for name in reversed(carriers):
            x = jax.lax.all_gather(x, name)
        return x.reshape(-1, *shape)

    return jax.tree.map(rows, tree)


def transpose(rows: PyTree, context: Context, axis: Axis = None) -> PyTree:
    """Gives row j of every worker to worker j.

    Args:
      rows: leaves `(n, ...)`.
      context: of the rule that asks.
      axis: worker axis, or several; None for all.

    Returns:
      Leaves `(n, ...)`; row i comes from worker i.
    """
    carriers = _carriers(context, _names(context, axis))
    sizes = [jax.lax.axis_size(name) for name in carriers]

    def exchange(x: jax.Array) -> jax.Array:
        # What is the same for all lanes, vmap's all-to-all would take for one lane's.
        own = jnp.where(index(context, axis) >= 0, x, x)
        grid = own.reshape(*sizes, *x.shape[1:])
        for i, name in enumerate(carriers):
            grid = jax.lax.all_to_all(grid, name, i, i)
        return grid.reshape(x.shape)

    return jax.tree.map(exchange, rows)


def scatter_sum(rows: jax.Array, context: Context, axis: Axis = None) -> jax.Array:
    """Gives worker j the sum of all rows j.

    Args:
      rows: `(n, ...)`.
      context: of the rule that asks.
      axis: worker axis, or several; None for all.

    Returns:
      One row, `(...)`.
    """
    carriers = _carriers(context, _names(context, axis))
    rows = rows.reshape(*map(jax.lax.axis_size, carriers), *rows.shape[1:])
    for name in carriers:
        rows = jax.lax.psum_scatter(rows, name)
    return rows


def shift(tree: PyTree, by: int, context: Context, axis: Axis = None) -> PyTree:
    """Gives everyone the tree of the worker that many places before.

        yₖ = x₍ₖ₋ₛ₎,   counted modulo n

    Args:
      tree: any pytree of arrays.
      by: s.
      context: of the rule that asks.
      axis: worker axis, or several; None for all.

    Returns:
      A tree like the first.
    """
    carriers = _carriers(context, _names(context, axis))
    return jax.tree.map(lambda x: _shift(x, carriers, by), tree)


def shares(context: Context, axis: Axis = None) -> jax.Array:
    """Returns the weights of all workers, ones if there are none.

    Args:
      context: of the rule that asks.
      axis: worker axis, or several; None for all.

    Returns:
      `(n,)`, float32 at least.
    """
    if context.weight is None:
        return jnp.ones(size(context, axis))
    return gather(group_weight(context, axis), context, axis)


def group_weight(context: Context, axis: Axis = None) -> jax.Array | None:
    """Returns what a worker's group weighs together: over the innermost axis, itself.

    Args:
      context: of the rule that asks.
      axis: over which groups meet.

    Returns:
      A scalar that is the same within the group, or None if there are no weights.
    """
    if context.weight is None:
        return None
    inner = _carriers(context, _inside(context, _names(context, axis)))
    share = widen(jnp.asarray(context.weight))
    return _sum(share, inner)


def _sum(tree: PyTree, carriers: tuple[str, ...]) -> PyTree:
    """Adds up over lanes, each device by itself, and then over the mesh."""
    lanes = [name for name in carriers if isinstance(name, Lane)]
    mesh = [name for name in carriers if not isinstance(name, Lane)]
    for name in lanes:
        tree = jax.tree.map(partial(_sum_lanes, name), tree)
    return jax.lax.psum(tree, mesh) if mesh else tree


def _sum_lanes(name: str, x: jax.Array) -> jax.Array:
    """Adds up over an axis of lanes, as a product with ones.

    XLA before JAX 0.12 adds rows of a matrix up ten times slower on CPUs than it
    multiplies.
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return jax.lax.psum(x, name)
    rows = jax.lax.all_gather(x, name)  # Between lanes nothing moves.
    ones = jnp.ones(rows.shape[0], rows.dtype)
    return jnp.tensordot(ones, rows, axes=1, precision="highest")


def _shift(x: jax.Array, carriers: tuple[str, ...], by: int) -> jax.Array:
    """Shifts over the inner carrier; what leaves it at its end enters the next one."""
    by %= math.prod(map(jax.lax.axis_size, carriers))
    if by == 0:
        return x
    *outer, name = carriers
    count = jax.lax.axis_size(name)
    rest = by % count
    if rest:
        x = jax.lax.ppermute(x, name, [(i, (i + rest) % count) for i in range(count)])
    near = _shift(x, tuple(outer), by // count)
    if not rest or not outer:
        return near
    far = _shift(x, tuple(outer), by // count + 1)
    return jnp.where(jax.lax.axis_index(name) < rest, far, near)


def _names(context: Context, axis: Axis) -> tuple[str, ...]:
    """Returns the worker axes that a rule asks for."""
    if axis is None:
        return tuple(context.axes)
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    for name in names:
        if name not in context.axes:
            raise ValueError(
                f"rule(axis={axis!r}): the workers live on the axes "
                f"{tuple(context.axes)}, which has no {name!r}"
            )
    return names


def _inside(context: Context, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the worker axes within the innermost of those named."""
    order = list(context.axes)
    return tuple(order[max(map(order.index, names), default=-1) + 1 :])


def _carriers(context: Context, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the named axes that carry worker axes."""
    return tuple(carrier for name in names for carrier in context.axes[name])
