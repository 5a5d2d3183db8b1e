"""Rule state sharded over workers (ZeRO)."""

import jax
import jax.numpy as jnp

from localsgd_jax.core import collectives
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pytrees import join_rows, ravel, split_rows, unravel, where
from localsgd_jax.core.types import PerWorker, PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check_int, check_rule
from localsgd_jax.rules.averaging import check_inexact


def shard_state(rule: SyncRule, workers: int) -> SyncRule:
    """Shards a rule and its state over K workers (ZeRO).

    The tree is flattened and split into K shards, [·]ₖ. Worker k owns shard k:

        [x]ₖ ← rule([Σⱼ wⱼ xⱼ / Σⱼ wⱼ]ₖ)        reduce-scatter, then the rule locally
        x ← ([x]₁, …, [x]_K)                    all-gather

    This sends the bytes of an all-reduce and needs 1/K of the memory for anchor and
    moments. It equals the rule itself if the rule treats every number independently, as
    SGD, momentum and Adam do. Clipping by a global norm would see one shard only.

    Args:
      rule: the rule that the owner applies to its shard, such as
        `outer(optax.adam(0.1))`.
      workers: K.

    Returns:
      A rule with the state `PerWorker`: one row for each worker.

    Raises:
      TypeError: if `rule` is not a rule or `workers` not an int.
      ValueError: if K < 1; when traced, if the synchronisation does not have K workers.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.shard_state(lsgd.outer(optax.adam(0.1)), workers=8)

    References:
      Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter
      Models, 2020, section 5.1. arXiv:1910.02054
    """
    check_rule("shard_state(rule)", rule)
    check_int("shard_state(workers)", "the number of workers", workers, 1)

    def init(tree: PyTree) -> RuleState:
        check_inexact("shard_state()", tree)
        states = jax.vmap(rule.init)(split_rows(ravel(tree), workers))
        return RuleState(local=PerWorker(states))

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        if (count := collectives.size(context)) != workers:
            raise ValueError(
                f"shard_state(workers): workers={workers}, but the synchronisation has "
                f"{count} workers"
            )
        any_active, active_context = collectives.any_participants(context)
        vector = ravel(tree)
        shard = _scattered_mean(vector, workers, active_context)
        shard_context = SyncContext({}, context.round)
        shard, shard_state = rule.apply(shard, state.local.tree, shard_context)
        gathered = join_rows(collectives.all_gather(shard, context), vector.size)
        new_state = RuleState(local=PerWorker(shard_state))
        return (
            where(any_active, unravel(gathered, tree), tree),
            where(any_active, new_state, state),
        )

    return SyncRule(init, apply, name=call_name("shard_state", rule, workers=workers))


def _scattered_mean(vector: jax.Array, workers: int, context: SyncContext) -> jax.Array:
    """Returns this worker's shard of the weighted mean over workers."""
    weight = context.weight
    if weight is None:
        rows = split_rows(vector, workers)
        return collectives.reduce_scatter(rows, context) / workers
    weighted = jnp.where(weight > 0, weight * vector, 0)
    shard = collectives.reduce_scatter(split_rows(weighted, workers), context)
    return shard / collectives.psum(weight, context)
