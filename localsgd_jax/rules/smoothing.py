"""A running mean of what workers agree on."""

from typing import NamedTuple

import jax

from localsgd_jax import collectives
from localsgd_jax.base import Context, PyTree, RuleState, SyncRule
from localsgd_jax.rules.combine import check_rule
from localsgd_jax.rules.mean import check_has_mean
from localsgd_jax.trees import choose, widen


class Smoothed(NamedTuple):
    """What `ema` remembers, one copy.

    Attributes:
      ema: the running mean, in float32 at least.
      rule: what the rule within remembers.
    """

    ema: PyTree
    rule: PyTree


def ema(rule: SyncRule, decay: float = 0.99) -> SyncRule:
    """Keeps an exponential moving average of the consensus, one copy for all workers.

    After each round, with the parameters x̄ that the rule has made the workers agree on,
    and e = x₀ at the start:

        e ← decay · e + (1 − decay) · x̄

    The workers never see it: evaluate `state.agreed["params"].ema`. Nothing more is
    sent. The rule must make workers agree; if nobody takes part nothing changes.

    Args:
      rule: such as `average()` or `diloco()`.
      decay: share of the past, in [0, 1).

    Returns:
      A rule that moves what `rule` moves.

    Raises:
      TypeError: if `rule` is not a rule.
      ValueError: if the decay is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5),
      ...                            rule=lsgd.ema(lsgd.average(), decay=0.75))
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> state, _ = cluster.step(cluster.init(jnp.zeros(())), jnp.array([1.0, 3.0]))
      >>> cluster.sync(state).agreed["params"].ema
      Array(0.5, dtype=float32)

    References:
      Polyak, Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992.
    """
    check_rule("ema(rule)", rule)
    if not 0 <= decay < 1:
        raise ValueError(f"ema(decay): it must be in [0, 1), got {decay}")

    def init(tree: PyTree) -> RuleState:
        check_has_mean("ema()", tree)
        inner = rule.init(tree)
        return RuleState(Smoothed(widen(tree), inner.agreed), inner.own)

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        before, remembered = state.agreed
        anyone, _ = collectives.present(context)
        tree, inner = rule.apply(tree, RuleState(remembered, state.own), context)
        now = widen(collectives.equal(tree))
        moved = jax.tree.map(lambda e, x: decay * e + (1 - decay) * x, before, now)
        after = Smoothed(choose(anyone, moved, before), inner.agreed)
        return tree, RuleState(after, inner.own)

    return SyncRule(init, apply)
