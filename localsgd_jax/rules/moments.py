"""What becomes of an optimizer's state: averaged where it has a mean, or begun anew."""

import jax
import jax.numpy as jnp

from localsgd_jax import collectives
from localsgd_jax.base import Context, PyTree, RuleState, SyncRule
from localsgd_jax.rules.combine import check_rule


def floats(rule: SyncRule) -> SyncRule:
    """Applies a rule to the floating point leaves and leaves all others alone.

        xₖ ← rule(xₖ)   for the leaves that have a mean
        xₖ ← xₖ         for integers, booleans and keys

    So `floats(average())` averages the moments of an optimizer and leaves its count of
    steps as it is, and `when(every(8), floats(average()))` does so in every eighth
    round. On a tree of floats `floats(rule)` equals `rule`.

    Args:
      rule: for the leaves that have a mean.

    Returns:
      A rule with the state of `rule`, which moves what `rule` moves.

    Raises:
      TypeError: if it is given no rule.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rare = lsgd.when(lsgd.every(8), lsgd.floats(lsgd.average()))
      >>> rule = {"params": lsgd.average(), "opt_state": rare}

    References:
      Iacob et al., DES-LOC: Desynced Low Communication Adaptive Optimizers for
      Training Foundation Models, 2025, Algorithm 1. arXiv:2505.22549
    """
    check_rule("floats(rule)", rule)

    def init(tree: PyTree) -> RuleState:
        return rule.init(_floats(tree))

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        agreed, state = rule.apply(_floats(tree), state, context)
        whole = jax.tree.map(
            lambda new, old: old if new is None else new,
            agreed,
            tree,
            is_leaf=lambda x: x is None,
        )
        return whole, state

    return SyncRule(init, apply)


def reset() -> SyncRule:
    """Puts every leaf back to what it was at the start of the run.

        xₖ ← x⁰

    An optimizer begins each round anew, its count of steps too: Adam corrects the bias
    of its young moments again, but a learning rate schedule inside it also starts from
    the top (`floats(reset())` lets it go on). Nothing changes if nobody has a positive
    weight.

    Returns:
      A rule that keeps the tree of the start, once for all workers. It moves nothing,
      or with weights one number.

    Raises:
      TypeError: at `init`, for a key, which is another one for each worker.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = {"params": lsgd.average(), "opt_state": lsgd.reset()}
    """

    def init(tree: PyTree) -> RuleState:
        for path, leaf in jax.tree.leaves_with_path(tree):
            if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
                raise TypeError(
                    "reset(): a key is another one for each worker and has no common "
                    f"start, got one at {jax.tree_util.keystr(path) or 'the root'}; "
                    "wrap it: floats(reset())"
                )
        return RuleState(agreed=tree)

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        _, anyone = collectives.mean((), context)
        fresh = jax.tree.map(
            lambda start, x: jnp.where(anyone, start, x), state.agreed, tree
        )
        return fresh, state

    return SyncRule(init, apply)


def _floats(tree: PyTree) -> PyTree:
    """Returns the tree without the leaves that have no mean."""
    return jax.tree.map(
        lambda x: x if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else None, tree
    )
