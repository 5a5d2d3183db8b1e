"""Rules made of rules: nothing, one after another, now and then."""

from collections.abc import Callable

import jax

from localsgd_jax.base import Context, PyTree, RuleState, SyncRule


def keep() -> SyncRule:
    """Leaves every worker's tree as it is.

        xₖ ← xₖ

    Returns:
      A rule without state that moves nothing.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rules = {"params": lsgd.average(), "opt_state": lsgd.keep()}
    """
    return SyncRule(
        lambda tree: RuleState(), lambda tree, state, context: (tree, state)
    )


def chain(*rules: SyncRule) -> SyncRule:
    """Applies rules one after another, each to the result of the one before.

        xₖ ← ruleₙ(… rule₂(rule₁(xₖ)))

    Args:
      *rules: at least one rule. `chain(rule)` equals `rule`.

    Returns:
      A rule whose state holds those of its parts in order.

    Raises:
      ValueError: without rules.
      TypeError: if a part is not a rule.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.chain(
      ...     lsgd.average("worker"), lsgd.when(lsgd.every(4), lsgd.average("pod"))
      ... )
    """
    if not rules:
        raise ValueError("chain(*rules): at least one rule is needed, got none")
    for rule in rules:
        check_rule("chain(*rules)", rule)

    def init(tree: PyTree) -> RuleState:
        states = [rule.init(tree) for rule in rules]
        return RuleState(*map(tuple, zip(*states, strict=True)))

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        states = []
        for rule, agreed, own in zip(rules, state.agreed, state.own, strict=True):
            tree, part = rule.apply(tree, RuleState(agreed, own), context)
            states.append(part)
        return tree, RuleState(*map(tuple, zip(*states, strict=True)))

    return SyncRule(init, apply)


def when(schedule: Callable, rule: SyncRule) -> SyncRule:
    """Applies a rule in the rounds that a schedule names; between them, nothing.

        xₖ ← rule(xₖ)   if schedule(r)
        xₖ ← xₖ         otherwise

    The round r counts from 1 and is the same for all workers, so either all of them
    enter the collective or none does. `when(every(1), rule)` equals `rule`.

    Args:
      schedule: from the number of a round to a bool, on Python and traced ints.
      rule: what to apply when it is due.

    Returns:
      A rule with the state of `rule`, which moves what `rule` moves when due.

    Raises:
      TypeError: if the schedule is not callable, or the rule not a rule.

    Example:
      >>> import localsgd_jax as lsgd
      >>> across_pods = lsgd.when(lsgd.every(4), lsgd.average("pod"))
    """
    if not callable(schedule):
        raise TypeError(f"when(schedule, rule): no schedule, got {schedule!r}")
    check_rule("when(schedule, rule)", rule)

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        due = schedule(context.round)
        if not isinstance(due, jax.Array):
            return rule.apply(tree, state, context) if due else (tree, state)
        return jax.lax.cond(
            due,
            lambda tree, state: rule.apply(tree, state, context),
            lambda tree, state: (tree, state),
            tree,
            state,
        )

    return SyncRule(rule.init, apply)


def check_rule(call: str, rule: SyncRule) -> None:
    """Refuses what is not a rule, such as the function that makes one."""
    if not isinstance(rule, SyncRule):
        raise TypeError(
            f"{call}: a SyncRule is needed, such as average(); got {rule!r}"
        )
