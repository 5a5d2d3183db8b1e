"""One vector instead of many leaves."""

import jax
import jax.numpy as jnp

from localsgd_jax import trees
from localsgd_jax.base import Context, PyTree, RuleState, SyncRule
from localsgd_jax.rules.combine import check_rule


def flatten(rule: SyncRule) -> SyncRule:
    """Applies a rule to one vector for each dtype instead of to the leaves.

    For trees of many small leaves, where every leaf of a collective costs time of its
    own, and for `overlap` on GPUs, where the all-reduce of one buffer spans the local
    steps. Flattening copies the tree twice and brings together what is sharded within a
    worker: leave it where leaves are large or sharded.

    Args:
      rule: any rule that treats all numbers alike.

    Returns:
      A rule whose state is about vectors; it moves what `rule` moves.

    Raises:
      TypeError: if `rule` is not a rule.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.flatten(lsgd.average())
    """
    check_rule("flatten(rule)", rule)

    def init(tree: PyTree) -> RuleState:
        return rule.init(_vectors(tree))

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        vectors, state = rule.apply(_vectors(tree), state, context)
        leaves, structure = jax.tree.flatten(tree)
        for name, places in _by_dtype(tree).items():
            part = [leaves[i] for i in places]
            for i, leaf in zip(places, trees.unflat(vectors[name], part), strict=True):
                leaves[i] = leaf
        return structure.unflatten(leaves), state

    return SyncRule(init, apply, rule.mean_over)


def _vectors(tree: PyTree) -> dict[str, jax.Array]:
    """Returns a vector for each dtype."""
    leaves = list(map(jnp.asarray, jax.tree.leaves(tree)))
    return {
        name: jnp.concatenate([leaves[i].reshape(-1) for i in places])
        for name, places in _by_dtype(tree).items()
    }


def _by_dtype(tree: PyTree) -> dict[str, list[int]]:
    """Returns the numbers of the leaves of each dtype."""
    found = {}
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        found.setdefault(jnp.result_type(leaf).name, []).append(i)
    return found
