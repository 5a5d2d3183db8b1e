"""Delayed synchronisation that can overlap with local steps."""

from collections.abc import Callable

import jax
from optax.tree_utils import tree_cast_like

from localsgd_jax.core import collectives
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pytrees import promote, where
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check_rule


def overlap(rule: SyncRule) -> SyncRule:
    """Synchronises the snapshot of the previous round and adds the progress since.

    With the snapshot sₖ, taken at the previous synchronisation:

        xₖ ← rule(sₖ) + (xₖ − sₖ)
        sₖ ← xₖ

    The snapshot exists before the local steps of the round, so a program may send it
    while it computes them. Whether it does is decided by the compiler. Programs
    compiled for two slices of TPU v5e, for 8 × H100 and for a TPU v5e 2×4 (JAX 0.12),
    which were read and not run, show:

    - Several TPU slices: the transfers between slices start before the loop of local
      steps and end after it, also in the programs of `train`, without flags.
    - GPUs: with `flatten(rule)` one all-reduce starts before the local steps of the
      next round and ends after them, if the program holds both rounds in sequence. In a
      program of one round, or a scan of rounds, almost nothing overlaps.
    - One TPU slice: an all-reduce blocks. With `shard_state(rule, workers)` the
      all-gather overlaps with the local steps; the reduce-scatter does not.
    - CPUs: nothing overlaps with a collective within one program.

    The mean over workers changes as with `rule` after every step, one round later: with
    `average()` it does not change at all. After a synchronisation workers differ by
    their progress in the last round. A worker of weight 0 continues from rule(sₖ).

    Args:
      rule: the rule that synchronises the snapshots.

    Returns:
      A rule with a snapshot for each worker; it communicates like `rule`.

    Raises:
      TypeError: if `rule` is not a rule.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.overlap(lsgd.diloco())

    References:
      Wang, Liang, Joshi, Overlap Local-SGD: An Algorithmic Approach to Hide
      Communication Delays in Distributed SGD, 2020. arXiv:2002.09539
    """
    check_rule("overlap(rule)", rule)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        snapshot, local = state.local
        any_active, _ = collectives.any_participants(context)
        synced, inner = rule.apply(snapshot, RuleState(state.shared, local), context)
        with_progress = jax.tree.map(
            lambda a, x, s: a + (x - s),
            promote(synced),
            promote(tree),
            promote(snapshot),
        )
        active = collectives.is_active(context)
        new_tree = where(active, tree_cast_like(with_progress, tree), synced)
        new_state = RuleState(inner.shared, (new_tree, inner.local))
        return where(any_active, new_tree, tree), where(any_active, new_state, state)

    return SyncRule(_init_with_snapshot(rule), apply, name=call_name("overlap", rule))


def delay(rule: SyncRule) -> SyncRule:
    """Takes a snapshot in odd rounds and synchronises it in even rounds.

        odd rounds:    sₖ ← xₖ
        even rounds:   xₖ ← rule(sₖ)

    The schedule sets the delay: `with_lead(schedule, tau)` takes snapshots τ steps
    before the synchronisation steps of the schedule, `with_lag(schedule, tau)`
    synchronises τ steps after them. Local progress between snapshot and synchronisation
    is lost unless `interpolate(delay(rule), alpha)` keeps a part of it. The rule counts
    its own rounds, 1, 2, …, one for two rounds of the schedule.

    The snapshot exists before the τ local steps. In a `gated` step it is sent in a
    branch, and the compilers for GPUs and TPUs wait for the branch. `train` compiles a
    program for the τ steps and the synchronisation after them, without a branch, in
    which transfers between TPU slices overlap with the steps as those of `overlap`.

    Args:
      rule: the rule that synchronises the snapshots.

    Returns:
      A rule with a snapshot for each worker, which communicates in even rounds only.

    Raises:
      TypeError: if `rule` is not a rule.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.interpolate(lsgd.delay(lsgd.diloco()), alpha=0.5)
      >>> schedule = lsgd.with_lead(lsgd.every(30), tau=5)

    References:
      Douillard et al., Streaming DiLoCo with overlapping communication, 2025, section
      2.3. arXiv:2501.18512
    """
    check_rule("delay(rule)", rule)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        def take_snapshot(tree: PyTree, state: RuleState) -> tuple[PyTree, RuleState]:
            active = collectives.is_active(context)
            snapshot = where(active, tree, state.local[0])
            return tree, RuleState(state.shared, (snapshot, state.local[1]))

        def sync_snapshot(tree: PyTree, state: RuleState) -> tuple[PyTree, RuleState]:
            snapshot, local = state.local
            inner_context = context._replace(round=context.round // 2)
            any_active, _ = collectives.any_participants(context)
            synced, inner = rule.apply(
                snapshot, RuleState(state.shared, local), inner_context
            )
            new_state = RuleState(inner.shared, (snapshot, inner.local))
            return where(any_active, synced, tree), where(any_active, new_state, state)

        is_even = context.round % 2 == 0
        if isinstance(is_even, jax.Array):
            return jax.lax.cond(is_even, sync_snapshot, take_snapshot, tree, state)
        return sync_snapshot(tree, state) if is_even else take_snapshot(tree, state)

    return SyncRule(_init_with_snapshot(rule), apply, name=call_name("delay", rule))


def _init_with_snapshot(rule: SyncRule) -> Callable[[PyTree], RuleState]:
    """Makes the `init` of a rule with a snapshot in its local state."""

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        inner = rule.init(tree, specs)
        return RuleState(inner.shared, (tree, inner.local))

    return init
