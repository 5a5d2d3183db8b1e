"""Clipping of each worker's update to the median norm over workers."""

import jax
import jax.numpy as jnp
import optax
from optax.tree_utils import tree_cast_like

from localsgd_jax.core import collectives
from localsgd_jax.core.averaging import check_inexact
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pytrees import promote, where
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check_rule


def clip_to_median_norm(rule: SyncRule) -> SyncRule:
    """Scales updates that are longer than the median over workers down to it.

        cₖ = min(1, medianⱼ ‖xⱼ‖ / ‖xₖ‖)
        xₖ ← rule(c₁ x₁, …, c_K x_K)

    The norm is that of the complete tree, the median that of the workers with positive
    weight. Clip differences, not parameters: use it as the reducing rule of `outer`.
    `drop_outliers` removes workers that are not finite.

    Args:
      rule: the rule for the clipped trees, such as `average()` or
        `chunked_top_k(average())`.

    Returns:
      A rule that sends one number per worker in addition to the messages of `rule`.

    Raises:
      TypeError: if `rule` is not a rule; at `init`, for a leaf that is not floating
        point or complex.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> mean = lsgd.clip_to_median_norm(lsgd.average())
      >>> rule = lsgd.outer(optax.sgd(1.0), mean)

    References:
      Covenant-72B, 2026. arXiv:2603.08163. Its operators clip the norms of peers to
      their median after decompression, here it is done before compression; described
      after a secondary source.
    """
    check_rule("clip_to_median_norm(rule)", rule)

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        check_inexact("clip_to_median_norm()", tree)
        return rule.init(tree, specs)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        norm = optax.tree.norm(promote(tree)).astype(jnp.float32)
        norms = collectives.all_gather(norm, context)
        active = collectives.gathered_weights(context) > 0
        any_active, _ = collectives.any_participants(context)
        scale = jnp.minimum(1, _median(norms, active) / jnp.where(norm > 0, norm, 1))
        clipped = jax.tree.map(lambda x: x * scale.astype(x.dtype), promote(tree))
        result, new_state = rule.apply(tree_cast_like(clipped, tree), state, context)
        return where(any_active, result, tree), where(any_active, new_state, state)

    return SyncRule(init, apply, name=call_name("clip_to_median_norm", rule))


def _median(values: jax.Array, included: jax.Array) -> jax.Array:
    """Returns the median of the included values, `(K,)`; the mean of a middle pair."""
    ordered = jnp.sort(jnp.where(included, values, jnp.inf))
    count = jnp.maximum(jnp.sum(included), 1)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
