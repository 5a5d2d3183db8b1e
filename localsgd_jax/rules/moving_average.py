"""Exponential moving average of the synchronised parameters."""

from typing import NamedTuple

import jax

from localsgd_jax.core import collectives
from localsgd_jax.core.averaging import check_inexact
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pytrees import promote, where
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check_number, check_rule
from localsgd_jax.rules.common_result import check_common_result


class EmaState(NamedTuple):
    """Shared state of `ema`.

    Attributes:
      ema: e, the moving average, in float32 or wider.
      rule: shared state of the inner rule.
    """

    ema: PyTree
    rule: PyTree


def ema(rule: SyncRule, decay: float = 0.99) -> SyncRule:
    """Keeps an exponential moving average of the parameters after each round.

    With x̄, the result of the rule, which is equal for all workers, and e = x₀ at the
    start:

        e ← decay · e + (1 − decay) · x̄

    The average is one shared copy. It does not affect the workers: evaluate
    `state.shared["params"].ema`. No additional bytes are sent. If all weights are 0,
    nothing changes.

    Args:
      rule: a rule after which all workers are equal, such as `average()` or `diloco()`.
      decay: weight of the previous average, in [0, 1).

    Returns:
      A rule that communicates like `rule`.

    Raises:
      TypeError: if `rule` is not a rule; at `init`, for a leaf that is not floating
        point or complex.
      ValueError: if the decay is outside [0, 1); when traced, if workers may differ
        after `rule`, as after `gossip()` or `drop_outliers(...)`, which goes outside:
        `drop_outliers(ema(rule))`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5),
      ...                            rule=lsgd.ema(lsgd.average(), decay=0.75))
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> state, _ = cluster.step(cluster.init(jnp.zeros(())), jnp.array([1.0, 3.0]))
      >>> cluster.sync(state).shared["params"].ema
      Array(0.5, dtype=float32)

    References:
      Polyak, Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992.
    """
    check_rule("ema(rule)", rule)
    decay = check_number("ema(decay)", "decay", decay, at_least=0, below=1)

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        check_inexact("ema()", tree)
        inner = rule.init(tree, specs)
        return RuleState(EmaState(promote(tree), inner.shared), inner.local)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        old, rule_shared = state.shared
        rule_state = RuleState(rule_shared, state.local)
        check_common_result("ema(rule)", rule, tree, rule_state, context)
        any_active, _ = collectives.any_participants(context)
        tree, inner = rule.apply(tree, rule_state, context)
        synced = promote(collectives.assume_replicated(tree))
        new = jax.tree.map(lambda e, x: decay * e + (1 - decay) * x, old, synced)
        shared = EmaState(where(any_active, new, old), inner.shared)
        return tree, RuleState(shared, inner.local)

    return SyncRule(init, apply, name=call_name("ema", rule, decay=decay))
