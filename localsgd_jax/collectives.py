"""Where workers talk: the only file that names a `jax.lax` collective."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from localsgd_jax.base import Context, PyTree


def over(context: Context, axis: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the named axes that carry `axis`; all worker axes for None."""
    names = (
        tuple(context.axes)
        if axis is None
        else (axis,)
        if isinstance(axis, str)
        else tuple(axis)
    )
    for name in names:
        if name not in context.axes:
            raise ValueError(
                f"rule(axis={axis!r}): the workers live on the axes "
                f"{tuple(context.axes)}, which has no {name!r}"
            )
    return tuple(carrier for name in names for carrier in context.axes[name])


def mean(
    tree: PyTree, axes: tuple[str, ...], weight: jax.Array | None = None
) -> tuple[PyTree, jax.Array | bool]:
    """Averages each leaf over workers, in float32 at least.

    With this worker's weight wₖ ≥ 0 (1 for all if None):

        x̄ = Σₖ wₖ xₖ / Σₖ wₖ

    A worker of weight 0 has no influence even if its leaves are not finite.

    Args:
      tree: pytree of floating point or complex leaves.
      axes: named axes to reduce over.
      weight: scalar share of this worker, or None.

    Returns:
      The mean in the dtypes of `tree`, and whether any weight is positive: a bool
      scalar that is the same for all workers; without one the mean is 0.
    """
    wide = jax.tree.map(_widen, tree)
    if weight is None:
        total, anyone = None, True
        summed = jax.lax.pmean(wide, axes)
    else:
        share = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
        heard = share > 0
        parts = jax.tree.map(
            lambda x: jnp.where(heard, x * share.astype(x.dtype), 0), wide
        )
        summed, total = jax.lax.psum((parts, share), axes)
        anyone = total > 0
        total = jnp.where(anyone, total, 1)
        summed = jax.tree.map(lambda x: x / total.astype(x.dtype), summed)
    return jax.tree.map(lambda m, x: m.astype(x.dtype), summed, tree), anyone


def _widen(x: jax.Array) -> jax.Array:
    """Casts to the dtype in which sums are accumulated."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
