"""Rule state sharded over workers (ZeRO)."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from optax.tree_utils import tree_cast_like

from localsgd_jax.core import collectives
from localsgd_jax.core.averaging import check_inexact
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pieces import concatenate, on_pieces, split, with_specs
from localsgd_jax.core.pytrees import join_rows, promote, split_rows, where
from localsgd_jax.core.types import PerWorker, PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check_int, check_rule


def shard_state(rule: SyncRule, workers: int) -> SyncRule:
    """Shards a rule and its state over K workers (ZeRO).

    The tree is concatenated and split into K shards, [·]ₖ. Worker k owns shard k. If
    a worker is itself sharded over several devices, each device splits its own piece:

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
    workers = check_int("shard_state(workers)", "the number of workers", workers, 1)

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        check_inexact("shard_state()", tree)
        context = SyncContext({}, 0, specs=specs)
        vectors, vector_specs = concatenate(promote(tree), context)

        def init_shard(shards: PyTree) -> RuleState:
            return with_specs(rule.init(shards, vector_specs), shards, vector_specs)

        states = jax.vmap(init_shard, axis_size=workers)(
            _split_shards(vectors, workers, vector_specs)
        )
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
        promoted = promote(tree)
        vectors, specs = concatenate(promoted, context)
        shards = _scattered_mean(vectors, workers, active_context._replace(specs=specs))
        shard_context = SyncContext({}, context.round, specs=specs)
        shards, shard_state = rule.apply(shards, state.local.tree, shard_context)
        gathered = _gathered(shards, vectors, context._replace(specs=specs))
        new = tree_cast_like(split(gathered, promoted, context), tree)
        new_state = RuleState(local=PerWorker(shard_state))
        return where(any_active, new, tree), where(any_active, new_state, state)

    return SyncRule(init, apply, name=call_name("shard_state", rule, workers=workers))


def _split_shards(vectors: dict, workers: int, specs: dict | None) -> dict:
    """Splits each device's block of each vector into K shards, `(K, m)`."""

    def split_block(context: SyncContext, vectors: dict) -> dict:
        del context
        return {name: split_rows(x, workers) for name, x in vectors.items()}

    context = SyncContext({}, 0, specs=specs)
    out_specs = specs and {name: P(None, *spec) for name, spec in specs.items()}
    return on_pieces(split_block, context, specs, out_specs)(vectors)


def _scattered_mean(vectors: dict, workers: int, context: SyncContext) -> dict:
    """Returns this worker's shard of the weighted mean over workers."""

    def reduce(context: SyncContext, vectors: dict) -> dict:
        weight = context.weight
        total = workers if weight is None else collectives.psum(weight, context)

        def reduce_vector(x: jax.Array) -> jax.Array:
            x = x if weight is None else jnp.where(weight > 0, weight * x, 0)
            return collectives.reduce_scatter(split_rows(x, workers), context) / total

        return jax.tree.map(reduce_vector, vectors)

    return on_pieces(reduce, context, context.specs, context.specs)(vectors)


def _gathered(shards: dict, vectors: dict, context: SyncContext) -> dict:
    """Returns the complete vectors from the shards of all workers."""

    def gather(context: SyncContext, shards: dict, vectors: dict) -> dict:
        rows = collectives.all_gather(shards, context)
        return jax.tree.map(lambda x, like: join_rows(x, like.size), rows, vectors)

    return on_pieces(gather, context, context.specs, context.specs)(shards, vectors)
