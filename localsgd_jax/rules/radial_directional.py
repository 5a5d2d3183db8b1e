"""Radial-directional averaging: a mean that keeps the length of updates."""

import jax
import jax.numpy as jnp
from optax.tree_utils import tree_cast_like

from localsgd_jax.core import collectives
from localsgd_jax.core.averaging import average, check_inexact
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pytrees import promote, where
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check_rule


def radial_directional_average(rule: SyncRule | None = None) -> SyncRule:
    """Averages norms and directions of each leaf separately (RDA).

    For each leaf, with the unit vectors uₖ = xₖ/‖xₖ‖ and their mean ū:

        ū ← rule(u₁, …, u_K)
        xₖ ← (Σⱼ wⱼ ‖xⱼ‖ / Σⱼ wⱼ) ū/‖ū‖

    The pseudo-gradients of K workers are almost orthogonal, so that the norm of their
    plain mean is smaller by a factor √K. Use it as the reducing rule of `outer`, with a
    plain mean for embeddings, whose rows are seldom updated by all workers; see
    `partition`. If ū is 0, so is the result.

    Args:
      rule: rule for the unit vectors; None for `average()`. After it all workers must
        be equal.

    Returns:
      A rule that sends one number per leaf in addition to the messages of `rule`.

    Raises:
      TypeError: if `rule` is not a rule; at `init`, for a leaf that is not floating
        point or complex.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> mean = lsgd.partition(
      ...     {"plain": lsgd.average(), "rda": lsgd.radial_directional_average()},
      ...     lambda path: "plain" if "embed" in path else "rda",
      ... )
      >>> rule = lsgd.outer(optax.sgd(0.7, momentum=0.9, nesterov=True), mean)

    References:
      Decoupled DiLoCo, 2026. arXiv:2604.21428. The equation follows secondary sources,
      which agree; it was not compared with the paper.
    """
    rule = average() if rule is None else rule
    check_rule("radial_directional_average(rule)", rule)
    axes = rule.mean_axes or None

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        check_inexact("radial_directional_average()", tree)
        return rule.init(promote(tree), specs)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        any_active, _ = collectives.any_participants(context)
        vectors = promote(tree)
        norms = jax.tree.map(_norm, vectors)
        direction, new_state = rule.apply(
            jax.tree.map(_divide, vectors, norms), state, context
        )
        # Norms are scalars, which are not sharded inside a worker.
        scalar_context = context._replace(specs=None)
        mean_norms, _ = collectives.mean(norms, scalar_context, axes)
        new = jax.tree.map(_with_norm, direction, mean_norms)
        return (
            where(any_active, tree_cast_like(new, tree), tree),
            where(any_active, new_state, state),
        )

    name = call_name("radial_directional_average", rule)
    return SyncRule(init, apply, name=name)


def _norm(x: jax.Array) -> jax.Array:
    """Returns the Euclidean norm; a sum keeps a sharded leaf sharded."""
    return jnp.sqrt(jnp.sum(jnp.abs(x) ** 2))


def _divide(x: jax.Array, norm: jax.Array) -> jax.Array:
    """Divides by a norm; a zero vector stays zero."""
    return x / jnp.where(norm > 0, norm, 1).astype(x.dtype)


def _with_norm(direction: jax.Array, norm: jax.Array) -> jax.Array:
    """Scales a vector to a norm."""
    return _divide(direction, _norm(direction)) * norm.astype(direction.dtype)
