"""Rules for optimizer state: skip leaves without a mean, or reset to the start."""

import jax
import jax.numpy as jnp

from localsgd_jax.core import collectives
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check_rule


def floating_only(rule: SyncRule) -> SyncRule:
    """Applies a rule to floating point and complex leaves and skips all others.

        xₖ ← rule(xₖ)   for floating point and complex leaves
        xₖ ← xₖ         for integers, booleans and keys

    For example, `floating_only(average())` averages the moments of an optimizer and
    keeps its step count, and `when(every(8), floating_only(average()))` does so in
    every eighth round. If all leaves are floating point, `floating_only(rule)` equals
    `rule`.

    Args:
      rule: the rule for floating point and complex leaves.

    Returns:
      A rule with the state of `rule`, which communicates like `rule`.

    Raises:
      TypeError: if `rule` is not a rule.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rare = lsgd.when(lsgd.every(8), lsgd.floating_only(lsgd.average()))
      >>> rule = {"params": lsgd.average(), "opt_state": rare}

    References:
      Iacob et al., DES-LOC: Desynced Low Communication Adaptive Optimizers for
      Training Foundation Models, 2025, Algorithm 1. arXiv:2505.22549
    """
    check_rule("floating_only(rule)", rule)

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        return rule.init(_inexact_leaves(tree), _select(specs, tree))

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        inner_context = context._replace(specs=_select(context.specs, tree))
        synced, state = rule.apply(_inexact_leaves(tree), state, inner_context)
        merged = jax.tree.map(
            lambda new, old: old if new is None else new,
            synced,
            tree,
            is_leaf=lambda x: x is None,
        )
        return merged, state

    return SyncRule(init, apply, name=call_name("floating_only", rule))


def reset_to_init() -> SyncRule:
    """Resets every leaf to its value at the start of the run.

        xₖ ← x⁰

    For an optimizer state this also resets the step count: Adam corrects the bias of
    its moments again, but a learning rate schedule inside the optimizer restarts as
    well (`floating_only(reset_to_init())` lets it continue). If all weights are 0,
    nothing changes.

    Returns:
      A rule whose shared state is the initial tree. It sends nothing, or one number if
      there are weights.

    Raises:
      TypeError: at `init`, for a key, because each worker has a different one.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = {"params": lsgd.average(), "opt_state": lsgd.reset_to_init()}
    """

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        for path, leaf in jax.tree.leaves_with_path(tree):
            if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
                raise TypeError(
                    "reset_to_init(): keys differ between workers and have no common "
                    f"initial value, got one at "
                    f"{jax.tree_util.keystr(path) or 'the root'}; use "
                    "floating_only(reset_to_init())"
                )
        return RuleState(shared=tree)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        _, any_active = collectives.mean((), context)
        reset = jax.tree.map(
            lambda initial, x: jnp.where(any_active, initial, x), state.shared, tree
        )
        return reset, state

    return SyncRule(init, apply, name=call_name("reset_to_init"))


def _inexact_leaves(tree: PyTree) -> PyTree:
    """Replaces leaves that are not floating point or complex by None."""
    return jax.tree.map(
        lambda x: x if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else None, tree
    )


def _select(specs: PyTree | None, tree: PyTree) -> PyTree | None:
    """Returns the specs of the leaves that `_inexact_leaves` keeps."""
    if specs is None:
        return None
    return jax.tree.map(
        lambda kept, spec: None if kept is None else spec,
        _inexact_leaves(tree),
        specs,
        is_leaf=lambda x: x is None,
    )
