"""Concatenation of leaves into vectors."""

from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pieces import concatenate, split, with_specs
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check_rule


def flatten(rule: SyncRule) -> SyncRule:
    """Applies a rule to concatenated leaves, one vector per dtype.

    Use it for trees of many small leaves, where the latency of one collective per leaf
    matters, and for `overlap` on GPUs, where the all-reduce of one buffer overlaps with
    the local steps. Flattening copies the tree twice: do not use it for large leaves.
    If a worker is sharded over several devices, each device concatenates its pieces of
    the leaves that are sharded over the same axes.

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

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        vectors, vector_specs = concatenate(tree, SyncContext({}, 0, specs=specs))
        return with_specs(rule.init(vectors, vector_specs), vectors, vector_specs)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        vectors, vector_specs = concatenate(tree, context)
        vector_context = context._replace(specs=vector_specs)
        vectors, state = rule.apply(vectors, state, vector_context)
        return split(vectors, tree, context), state

    return SyncRule(init, apply, rule.mean_axes, call_name("flatten", rule))
