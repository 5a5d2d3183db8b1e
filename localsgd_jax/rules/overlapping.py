"""Agreement that arrives late, so that local steps may run beside it."""

import jax

from localsgd_jax import collectives
from localsgd_jax.base import Context, PyTree, RuleState, SyncRule
from localsgd_jax.rules.combine import check_rule
from localsgd_jax.trees import choose, narrow, widen


def overlap(rule: SyncRule) -> SyncRule:
    """Agrees on where workers were a round ago, and keeps what they did since.

    With the snapshot sₖ, taken at the synchronisation before:

        xₖ ← rule(sₖ) + (xₖ − sₖ)
        sₖ ← xₖ

    What travels exists before the local steps of the round, so a program may send while
    it computes. What really runs beside is the compiler's choice. Programs compiled for
    8 × H100 and for a TPU v5e 2×4 (JAX 0.12, `localsgd audit --target`) show:

    - GPUs: with `flatten(rule)` one all-reduce starts before the local steps of the
      next round and ends after them, if the program holds both rounds one after the
      other; in a program of one round, or a scan of rounds, hardly anything does.
    - TPUs: an all-reduce is waited for. With `shard(rule, workers)` the all-gather
      runs during the local steps; the reduce-scatter does not.
    - CPUs: nothing runs beside a collective within one program.

    The mean of the workers moves as with `rule` after every step, only later: with
    `average()` it is not moved at all. At a synchronisation workers differ by what they
    did in the last round. A worker of weight 0 goes on from rule(sₖ).

    Args:
      rule: what agrees on the snapshots.

    Returns:
      A rule with a snapshot for each worker; it moves what `rule` moves.

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

    def init(tree: PyTree) -> RuleState:
        inner = rule.init(tree)
        return RuleState(inner.agreed, (tree, inner.own))

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        snapshot, own = state.own
        anyone, _ = collectives.present(context)
        agreed, inner = rule.apply(snapshot, RuleState(state.agreed, own), context)
        moved = jax.tree.map(
            lambda a, x, s: a + (x - s), widen(agreed), widen(tree), widen(snapshot)
        )
        moved = choose(_here(context), narrow(moved, tree), agreed)
        after = RuleState(inner.agreed, (moved, inner.own))
        return choose(anyone, moved, tree), choose(anyone, after, state)

    return SyncRule(init, apply)


def delay(rule: SyncRule) -> SyncRule:
    """Takes a snapshot in one round, and in the next agrees on it.

        odd rounds:    sₖ ← xₖ
        even rounds:   xₖ ← rule(sₖ)

    The schedule says how much later: `early(schedule, tau)` takes snapshots τ steps
    before the beat and agrees on it, `late(schedule, tau)` takes them on the beat and
    agrees τ steps after. What a worker did in between is lost unless a part of it is
    kept by `mix(delay(rule), alpha)`. The rule's own rounds count its turns: 1, 2, ….

    What travels exists before the τ local steps. In a gated step it stands in a branch,
    for which the compilers wait on GPUs and TPUs alike; a program of its own for the τ
    steps and the round after them leaves the compiler the choice that `overlap` has.

    Args:
      rule: what agrees on the snapshots.

    Returns:
      A rule with a snapshot for each worker; in even rounds it moves what `rule` moves.

    Raises:
      TypeError: if `rule` is not a rule.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.mix(lsgd.delay(lsgd.diloco()), alpha=0.5)
      >>> schedule = lsgd.early(lsgd.every(30), tau=5)

    References:
      Douillard et al., Streaming DiLoCo with overlapping communication, 2025, section
      2.3. arXiv:2501.18512
    """
    check_rule("delay(rule)", rule)

    def init(tree: PyTree) -> RuleState:
        inner = rule.init(tree)
        return RuleState(inner.agreed, (tree, inner.own))

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        def look(tree: PyTree, state: RuleState) -> tuple[PyTree, RuleState]:
            snapshot = choose(_here(context), tree, state.own[0])
            return tree, RuleState(state.agreed, (snapshot, state.own[1]))

        def agree(tree: PyTree, state: RuleState) -> tuple[PyTree, RuleState]:
            snapshot, own = state.own
            turn = context._replace(round=context.round // 2)
            anyone, _ = collectives.present(context)
            agreed, inner = rule.apply(snapshot, RuleState(state.agreed, own), turn)
            after = RuleState(inner.agreed, (snapshot, inner.own))
            return choose(anyone, agreed, tree), choose(anyone, after, state)

        due = context.round % 2 == 0
        if isinstance(due, jax.Array):
            return jax.lax.cond(due, agree, look, tree, state)
        return agree(tree, state) if due else look(tree, state)

    return SyncRule(init, apply)


def _here(context: Context) -> jax.Array | bool:
    """Returns whether this worker takes part."""
    return True if context.weight is None else context.weight > 0
