"""Names of rules, which processes and checkpoints compare."""

import functools

import optax
import pytest
from harness.cases import RULES

import localsgd_jax as lsgd


@pytest.mark.parametrize(
    "rule, name",
    [
        (lsgd.average(), "average()"),
        (lsgd.average("worker"), "average(axis='worker')"),
        (lsgd.average(("pod", "worker")), "average(axis=('pod', 'worker'))"),
        (lsgd.identity(), "identity()"),
        (lsgd.chain(lsgd.average(), lsgd.identity()), "chain(average(), identity())"),
        (lsgd.when(lsgd.every(2), lsgd.average()), "when(every(2), average())"),
        (lsgd.floating_only(lsgd.average()), "floating_only(average())"),
        (lsgd.reset_to_init(), "reset_to_init()"),
        (lsgd.diloco(0.5), "diloco(learning_rate=0.5, momentum=0.9)"),
        (
            lsgd.quantize(lsgd.average("pod"), 4),
            "quantize(average(axis='pod'), bits=4, rounding='nearest', block=256, "
            "seed=0)",
        ),
        (lsgd.cast(lsgd.average()), "cast(average(), dtype='bfloat16')"),
        (
            lsgd.outer(optax.identity(), "pod"),
            "outer(optimizer=identity, reduce=average(axis='pod'))",
        ),
        (
            lsgd.fragment(lsgd.average(), 2, grouping=len),
            "fragment(average(), n=2, grouping=len, rounds_per_fragment=1)",
        ),
        (
            lsgd.merge_batch_stats(),
            "merge_batch_stats(mean='mean', variance='var')",
        ),
        (
            lsgd.with_diagnostics(lsgd.shard_state(lsgd.slowmo(), 8)),
            "with_diagnostics(shard_state(slowmo(learning_rate=1.0, momentum=0.7), "
            "workers=8))",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_name_is_the_call_with_its_arguments(rule, name):
    assert rule.name == repr(rule) == name


def test_all_rules_of_the_table_have_different_names_without_addresses():
    names = [case.rule.name for case in RULES.values()]
    assert len(set(names)) == len(names)
    assert not any("0x" in name or "custom" in name for name in names)


def test_rule_without_name_is_named_after_its_apply():
    def apply(tree, state, context):
        return tree, state

    init = lambda tree: lsgd.RuleState()  # noqa: E731
    test = "test_rule_without_name_is_named_after_its_apply"
    assert lsgd.SyncRule(init, apply).name == f"custom({test})"
    partial = functools.partial(scale, factor=2)
    assert lsgd.SyncRule(init, partial).name == "custom(scale)"
    assert lsgd.SyncRule(init, apply, name="scale(2)").name == "scale(2)"


def scale(tree, state, context, *, factor):
    """A rule made by functools.partial."""
    return tree * factor, state


def test_algorithm_has_the_names_of_its_rules():
    rules = {"params": lsgd.average(), "opt_state": lsgd.identity()}
    made = lsgd.local_sgd(lambda x, b: x, optax.sgd(0.1), rules)
    assert made.rule_names == {"params": "average()", "opt_state": "identity()"}
