"""Different rules for different leaves of a tree, and DES-LOC."""

from collections.abc import Callable, Mapping

import jax

from localsgd_jax.core.averaging import average
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pieces import with_specs
from localsgd_jax.core.types import (
    PyTree,
    RuleState,
    SyncContext,
    SyncRule,
    states_by_name,
)
from localsgd_jax.core.validation import (
    check,
    check_int,
    check_rule,
    check_type,
    describe,
)
from localsgd_jax.rules.combinators import identity, when
from localsgd_jax.schedules import every


def partition(
    rules: Mapping[str, SyncRule], labels: Callable[[str], str] | PyTree
) -> SyncRule:
    """Applies a different rule to each group of leaves.

    With the label l(i) of leaf i:

        [xₖ]ₗ ← ruleₗ([x]ₗ)   for each label l, where [x]ₗ are the leaves with l(i) = l

    Each rule receives the tree with None in place of all other leaves, and has a state
    of its own. If all leaves have one label, it equals the rule of this label.

    Args:
      rules: rule for each label.
      labels: a function from the path of a leaf, such as "layers.3.w", to its label, or
        a tree of labels that is a prefix of the tree, as in `optax.partition`.

    Returns:
      A rule with the states of `rules` by label; it sends what they send.

    Raises:
      TypeError: if `rules` is not a dict of rules.
      ValueError: without rules; at `init`, if a label has no rule, or a rule no leaf.

    Example:
      >>> import localsgd_jax as lsgd
      >>> def labels(path):
      ...     return "adapter" if "lora" in path.split(".") else "frozen"
      >>> rules = {"adapter": lsgd.diloco(), "frozen": lsgd.identity()}
      >>> rule = lsgd.partition(rules, labels)

    References:
      Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2022, section 4.1:
      training of adapters only. arXiv:2106.09685
      Collins, Hassani, Mokhtari, Shakkottai, Exploiting Shared Representations for
      Personalized Federated Learning, 2021, Algorithm 1: private layers.
      arXiv:2102.07078
    """
    check_type("partition(rules)", "rules", rules, Mapping)
    check(rules, "partition(rules)", "at least one rule is required", rules)
    for label, rule in rules.items():
        check_rule(f"partition(rules[{label!r}])", rule)
    rules = dict(rules)

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        leaf_labels = _leaf_labels(tree, labels, rules)
        states = {}
        for label, rule in rules.items():
            part = _select(tree, leaf_labels, label)
            part_specs = _select(specs, leaf_labels, label)
            state = rule.init(part, part_specs)
            states[label] = with_specs(state, part, part_specs)
        return states_by_name(states)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        leaf_labels = _leaf_labels(tree, labels, rules)
        leaves, structure = jax.tree.flatten(tree)
        states = {}
        for label, rule in rules.items():
            part = _select(tree, leaf_labels, label)
            specs = _select(context.specs, leaf_labels, label)
            part_state = RuleState(state.shared[label], state.local[label])
            part, states[label] = rule.apply(
                part, part_state, context._replace(specs=specs)
            )
            updated = iter(jax.tree.leaves(part))
            leaves = [
                next(updated) if own == label else leaf
                for own, leaf in zip(leaf_labels, leaves, strict=True)
            ]
        return structure.unflatten(leaves), states_by_name(states)

    return SyncRule(init, apply, name=call_name("partition", rules, labels))


def desloc(
    rule: SyncRule | None = None, first_moment: int = 3, second_moment: int = 6
) -> dict[str, SyncRule]:
    """Synchronises the parameters and the moments of Adam with separate periods.

    In round r, with the first moments u and the second moments v of Adam:

        xₖ ← rule(x)
        uₖ ← Σⱼ wⱼ uⱼ / Σⱼ wⱼ   if r mod first_moment = 0
        vₖ ← Σⱼ wⱼ vⱼ / Σⱼ wⱼ   if r mod second_moment = 0

    With a schedule of period Kₓ the moments have the periods 3 Kₓ and 6 Kₓ by default.
    Step counts and other leaves stay local. `desloc(first_moment=1, second_moment=1)`
    is Local Adam. A leaf is a first moment if its path in the optimizer state has the
    part "mu", as in `optax.adam`, `adamw` and `lion`, and a second moment if it has
    "nu".

    Args:
      rule: rule for the parameters; None for `average()`.
      first_moment: number of rounds between means of u.
      second_moment: number of rounds between means of v.

    Returns:
      The rules of "params" and "opt_state", for `local_sgd` and the adapters for Flax.

    Raises:
      TypeError: if `rule` is not a rule or a period not an int.
      ValueError: if a period is below 1; at `init`, if the optimizer has no such
        moments.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> loss_fn = lambda w, target: jnp.sum((w - target) ** 2)
      >>> algorithm = lsgd.local_sgd(loss_fn, optax.adam(0.1), rule=lsgd.desloc())

    References:
      Iacob et al., DES-LOC: Desynced Low Communication Adaptive Optimizers for
      Training Foundation Models, 2025, Algorithm 1. arXiv:2505.22549. The multiples 3
      and 6 are taken from a secondary source.
    """
    rule = average() if rule is None else rule
    check_rule("desloc(rule)", rule)
    periods = {"first_moment": first_moment, "second_moment": second_moment}
    for name, period in periods.items():
        check_int(f"desloc({name})", name, period, 1)
    moments = {
        name: average() if period == 1 else when(every(period), average())
        for name, period in periods.items()
    }
    return {
        "params": rule,
        "opt_state": partition({**moments, "other": identity()}, adam_moments),
    }


def adam_moments(path: str) -> str:
    """Labels a leaf of an optimizer state as a moment of Adam or as other.

    Args:
      path: path of the leaf, such as "0.mu.layers.3.w".

    Returns:
      "first_moment" below "mu", "second_moment" below "nu", else "other". The first of
      these parts decides, so parameters may have these names.

    Example:
      >>> [adam_moments(path) for path in ("0.mu.w", "0.nu.mu", "0.count")]
      ['first_moment', 'second_moment', 'other']
    """
    names = {"mu": "first_moment", "nu": "second_moment"}
    return next((names[part] for part in path.split(".") if part in names), "other")


def _leaf_labels(
    tree: PyTree, labels: Callable[[str], str] | PyTree, rules: Mapping[str, SyncRule]
) -> list[str]:
    """Returns the label of each leaf, in the order of `jax.tree.leaves`."""
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree.leaves_with_path(tree)
    ]
    found: list[str]
    if callable(labels):
        found = [str(labels(name)) for name in names]
    else:
        try:
            found = jax.tree.leaves(jax.tree.broadcast(labels, tree))
        except ValueError:
            text = f"labels must be a prefix of the tree with leaves {names}"
            got = describe(labels)
            raise ValueError(f"partition(labels): {text}, got {got}") from None
    for name, label in zip(names, found, strict=True):
        text = f"the label of {name!r} must be one of {sorted(rules, key=str)}"
        check(label in rules, "partition(labels)", text, repr(label))
    for label in rules:
        text = f"a leaf must have the label {label!r}"
        check(label in found, "partition(labels)", text, f"labels for {names}")
    return found


def _select(tree: PyTree | None, leaf_labels: list[str], label: str) -> PyTree | None:
    """Replaces leaves with other labels by None."""
    if tree is None:
        return None
    leaves, structure = jax.tree.flatten(tree)
    kept = (
        leaf if own == label else None
        for own, leaf in zip(leaf_labels, leaves, strict=True)
    )
    return structure.unflatten(kept)
