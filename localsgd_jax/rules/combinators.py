"""Rule combinators: identity, chain and conditional application."""

from collections.abc import Callable

import jax

from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.predicates import check_bool, probe_predicate
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check_rule, check_type


def identity() -> SyncRule:
    """Leaves the tree of every worker unchanged.

        xₖ ← xₖ

    Returns:
      A rule without state that sends nothing.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rules = {"params": lsgd.average(), "opt_state": lsgd.identity()}
    """

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        del tree
        return RuleState()

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        del context
        return tree, state

    return SyncRule(init, apply, name="identity()")


def chain(*rules: SyncRule) -> SyncRule:
    """Applies rules in sequence, each to the result of the previous one.

        xₖ ← ruleₙ(… rule₂(rule₁(xₖ)))

    Args:
      *rules: one or more rules. `chain(rule)` equals `rule`.

    Returns:
      A rule whose state is the tuple of the states of its parts.

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
        raise ValueError("chain(*rules): at least one rule is required, got none")
    for rule in rules:
        check_rule("chain(*rules)", rule)

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        states = [rule.init(tree, specs) for rule in rules]
        return RuleState(*map(tuple, zip(*states, strict=True)))

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        states = []
        for rule, shared, local in zip(rules, state.shared, state.local, strict=True):
            tree, rule_state = rule.apply(tree, RuleState(shared, local), context)
            states.append(rule_state)
        return tree, RuleState(*map(tuple, zip(*states, strict=True)))

    return SyncRule(init, apply, name=call_name("chain", *rules))


def when(schedule: Callable, rule: SyncRule) -> SyncRule:
    """Applies a rule only in the rounds of a schedule.

        xₖ ← rule(xₖ)   if schedule(r)
        xₖ ← xₖ         otherwise

    The round r counts from 1 and is the same for all workers, so either all of them
    execute the collective or none. `when(every(1), rule)` equals `rule`.

    Args:
      schedule: maps a round number, a Python or a traced int, to a bool.
      rule: the rule to apply in rounds of the schedule.

    Returns:
      A rule with the state of `rule`. It communicates in rounds of the schedule
      only.

    Raises:
      TypeError: if the schedule is not callable, or the rule not a rule; at `init`, if
        the schedule does not return a bool.
      ValueError: at `init`, if the schedule is not deterministic.

    Example:
      >>> import localsgd_jax as lsgd
      >>> across_pods = lsgd.when(lsgd.every(4), lsgd.average("pod"))
    """
    check_type("when(schedule)", "schedule", schedule, Callable)
    check_rule("when(rule)", rule)
    call = "when(schedule)"

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        probe_predicate(call, schedule)
        return rule.init(tree, specs)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        due = schedule(context.round)
        check_bool(call, due)
        if not isinstance(due, jax.Array):
            return rule.apply(tree, state, context) if due else (tree, state)
        return jax.lax.cond(
            due,
            lambda tree, state: rule.apply(tree, state, context),
            lambda tree, state: (tree, state),
            tree,
            state,
        )

    return SyncRule(init, apply, name=call_name("when", schedule, rule))
