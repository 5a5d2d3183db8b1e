"""Agreement by halves: workers drawn towards a centre or towards what a rule says."""

import jax

from localsgd_jax import collectives
from localsgd_jax.base import Context, PyTree, RuleState, SyncRule
from localsgd_jax.rules.combine import check_rule
from localsgd_jax.rules.mean import check_has_mean
from localsgd_jax.trees import choose, narrow, widen


def elastic(alpha: float = 0.1, beta: float = 0.9) -> SyncRule:
    """EASGD: workers and a centre pull at each other.

    From the values before, with the mean over workers x̄ = Σₖ wₖ xₖ / Σₖ wₖ:

        xₖ ← xₖ − α (xₖ − z)
        z ← z + β (x̄ − z)

    The centre z is one agreed copy, in float32 at least; the paper has β = Kα. A worker
    of weight 0 is left out of x̄ and goes on from z. If nobody takes part nothing
    changes. α = β = 1 exchanges centre and workers; it is no average.

    Args:
      alpha: α, in [0, 1].
      beta: β, in [0, 1].

    Returns:
      A rule after which workers need not agree. It moves one all-reduce of the tree.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.elastic(alpha=0.9 / 8, beta=0.9)   # eight workers

    References:
      Zhang, Choromanska, LeCun, Deep Learning with Elastic Averaging SGD, 2015,
      equations 5 and 6. arXiv:1412.6651
    """
    check_share("elastic(alpha)", alpha)
    check_share("elastic(beta)", beta)

    def init(tree: PyTree) -> RuleState:
        check_has_mean("elastic()", tree)
        return RuleState(agreed=widen(tree))

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        centre, wide = state.agreed, widen(tree)
        mean, anyone = collectives.mean(wide, context)
        pulled = jax.tree.map(lambda x, z: x - alpha * (x - z), wide, centre)
        if context.weight is not None:
            pulled = choose(context.weight > 0, pulled, centre)
        moved = jax.tree.map(lambda z, m: z + beta * (m - z), centre, mean)
        after = RuleState(agreed=choose(anyone, moved, centre))
        return choose(anyone, narrow(pulled, tree), tree), after

    return SyncRule(init, apply)


def mix(rule: SyncRule, alpha: float) -> SyncRule:
    """Goes only a part of the way to what a rule says.

        xₖ ← xₖ + (1 − α) (rule(xₖ) − xₖ)   =   α xₖ + (1 − α) rule(xₖ)

    `mix(rule, 0)` equals `rule`; with α = 1 only the rule's memory changes. A worker of
    weight 0 goes the whole way.

    Args:
      rule: any rule.
      alpha: α, in [0, 1]: the share of a worker's own value.

    Returns:
      A rule that remembers and moves what `rule` does.

    Raises:
      TypeError: if `rule` is not a rule.
      ValueError: if α is outside [0, 1].

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.mix(lsgd.diloco(), alpha=0.5)

    References:
      Douillard et al., Streaming DiLoCo with overlapping communication, 2025, section
      2.3. arXiv:2501.18512
    """
    check_rule("mix(rule)", rule)
    check_share("mix(alpha)", alpha)

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        agreed, state = rule.apply(tree, state, context)
        if alpha == 0:
            return agreed, state
        own, target = widen(tree), widen(agreed)
        mixed = jax.tree.map(lambda x, t: x + (1 - alpha) * (t - x), own, target)
        mixed = narrow(mixed, tree)
        if context.weight is not None:
            mixed = choose(context.weight > 0, mixed, agreed)
        return mixed, state

    return SyncRule(rule.init, apply)


def check_share(call: str, share: float) -> None:
    """Refuses what is not a share."""
    if not 0 <= share <= 1:
        raise ValueError(f"{call}: it must be in [0, 1], got {share}")
