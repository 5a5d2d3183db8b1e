"""Default synchronisation rules for the fields of Flax train states."""

import jax

from localsgd_jax.core import train_state
from localsgd_jax.core.algorithm import Fields, Rules, rules_by_field
from localsgd_jax.core.types import PyTree, SyncRule
from localsgd_jax.rules.batch_statistics import merge_batch_stats


def add_default_rules(state: PyTree, rule: Rules) -> dict[Fields, SyncRule]:
    """Adds the default rule for batch statistics.

    It is added if the state has batch statistics and `rule` has no rule for them.

    Args:
      state: train state of one worker.
      rule: rule for `params`, or a dict from field to rule; None for `average()`.

    Returns:
      A dict from field to rule.
    """
    rules = rules_by_field(rule)
    if "batch_stats" in train_state.field_names(state):
        fields = train_state.get_fields(state, ["batch_stats"])
        if jax.tree.leaves(fields):
            rules.setdefault("batch_stats", merge_batch_stats())
    return rules
