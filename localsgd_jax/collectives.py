"""Where workers talk: the only file that names a `jax.lax` collective."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from localsgd_jax.base import Context, PyTree

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
    wide = jax.tree.map(_widen, tree)
    if context.weight is None:
        return _narrow(jax.lax.pmean(wide, carriers), tree), True
    share = _widen(context.weight)
    inner = _carriers(context, _inside(context, names))
    share = jax.lax.psum(share, inner) if inner else share
    parts = jax.tree.map(
        lambda x: jnp.where(share > 0, x * share.astype(x.dtype), 0), wide
    )
    summed, total = jax.lax.psum((parts, share), carriers)
    anyone = total > 0
    total = jnp.where(anyone, total, 1)
    averaged = jax.tree.map(lambda x: x / total.astype(x.dtype), summed)
    return _narrow(averaged, tree), anyone


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
    return tuple(order[max(map(order.index, names)) + 1 :])


def _carriers(context: Context, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the named axes that carry worker axes."""
    return tuple(carrier for name in names for carrier in context.axes[name])


def _widen(x: jax.Array) -> jax.Array:
    """Casts to the dtype in which sums are accumulated."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _narrow(wide: PyTree, tree: PyTree) -> PyTree:
    """Casts back to the dtypes of a tree."""
    return jax.tree.map(lambda m, x: m.astype(x.dtype), wide, tree)
