"""Concatenation of leaves into one vector per dtype."""

import jax
import jax.numpy as jnp

from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pytrees import unravel
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check_rule


def flatten(rule: SyncRule) -> SyncRule:
    """Applies a rule to concatenated leaves, one vector per dtype.

    Use it for trees of many small leaves, where the latency of one collective per leaf
    matters, and for `overlap` on GPUs, where the all-reduce of one buffer overlaps with
    the local steps. Flattening copies the tree twice and gathers leaves that are
    sharded within a worker: do not use it for large or sharded leaves.

    Args:
      rule: any rule that treats all numbers alike.

    Returns:
      A rule with a state of vectors; it communicates like `rule`.

    Raises:
      TypeError: if `rule` is not a rule.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.flatten(lsgd.average())
    """
    check_rule("flatten(rule)", rule)

    def init(tree: PyTree) -> RuleState:
        return rule.init(_concatenate_by_dtype(tree))

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        vectors, state = rule.apply(_concatenate_by_dtype(tree), state, context)
        leaves, structure = jax.tree.flatten(tree)
        for dtype, indices in _indices_by_dtype(tree).items():
            new = unravel(vectors[dtype], [leaves[i] for i in indices])
            for i, leaf in zip(indices, new, strict=True):
                leaves[i] = leaf
        return structure.unflatten(leaves), state

    return SyncRule(init, apply, rule.mean_axes, call_name("flatten", rule))


def _concatenate_by_dtype(tree: PyTree) -> dict[str, jax.Array]:
    """Concatenates the leaves of each dtype into one vector."""
    leaves = list(map(jnp.asarray, jax.tree.leaves(tree)))
    return {
        dtype: jnp.concatenate([leaves[i].reshape(-1) for i in indices])
        for dtype, indices in _indices_by_dtype(tree).items()
    }


def _indices_by_dtype(tree: PyTree) -> dict[str, list[int]]:
    """Groups the indices of the leaves by dtype."""
    groups = {}
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        groups.setdefault(jnp.result_type(leaf).name, []).append(i)
    return groups
