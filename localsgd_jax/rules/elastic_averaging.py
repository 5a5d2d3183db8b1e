"""Elastic averaging (EASGD) and interpolation between workers and a rule's result."""

import jax
from optax.tree_utils import tree_cast_like

from localsgd_jax.core import collectives
from localsgd_jax.core.averaging import check_inexact
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pytrees import is_traced, promote, where
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check_number, check_rule


def elastic_average(alpha: float = 0.1, beta: float = 0.9) -> SyncRule:
    """Moves workers and a shared centre towards each other (EASGD).

    From the values before, with the mean over workers x̄ = Σₖ wₖ xₖ / Σₖ wₖ:

        xₖ ← xₖ − α (xₖ − z)
        z ← z + β (x̄ − z)

    The centre z is shared state, in float32 or wider; the paper has β = Kα. A worker of
    weight 0 does not contribute to x̄ and continues from z. If all weights are 0,
    nothing changes. α = β = 1 exchanges centre and workers; it is not an average.

    Args:
      alpha: α, in [0, 1].
      beta: β, in [0, 1].

    Returns:
      A rule after which workers need not be equal. It sends one all-reduce of the tree.

    Raises:
      TypeError: at `init`, for a leaf that is not floating point or complex.
      ValueError: if a number is out of range.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.elastic_average(alpha=0.9 / 8, beta=0.9)   # eight workers

    References:
      Zhang, Choromanska, LeCun, Deep Learning with Elastic Averaging SGD, 2015,
      equations 5 and 6. arXiv:1412.6651
    """
    alpha = check_number(
        "elastic_average(alpha)", "alpha", alpha, at_least=0, at_most=1
    )
    beta = check_number("elastic_average(beta)", "beta", beta, at_least=0, at_most=1)

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        check_inexact("elastic_average()", tree)
        return RuleState(shared=promote(tree))

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        centre, workers = state.shared, promote(tree)
        mean, any_active = collectives.mean(workers, context)
        new_workers = jax.tree.map(lambda x, z: x - alpha * (x - z), workers, centre)
        new_workers = where(collectives.is_active(context), new_workers, centre)
        new_centre = jax.tree.map(lambda z, m: z + beta * (m - z), centre, mean)
        new_state = RuleState(shared=where(any_active, new_centre, centre))
        return where(any_active, tree_cast_like(new_workers, tree), tree), new_state

    name = call_name("elastic_average", alpha=alpha, beta=beta)
    return SyncRule(init, apply, name=name)


def interpolate(rule: SyncRule, alpha: float) -> SyncRule:
    """Interpolates between the tree of a worker and the result of a rule.

        xₖ ← xₖ + (1 − α) (rule(xₖ) − xₖ)   =   α xₖ + (1 − α) rule(xₖ)

    `interpolate(rule, 0)` equals `rule`; with α = 1 only the state of the rule changes.
    A worker of weight 0 receives rule(xₖ).

    Args:
      rule: any rule.
      alpha: α, in [0, 1], the weight of the worker's own tree.

    Returns:
      A rule with the state of `rule`, which communicates like `rule`.

    Raises:
      TypeError: if `rule` is not a rule.
      ValueError: if α is outside [0, 1].

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.interpolate(lsgd.diloco(), alpha=0.5)

    References:
      Douillard et al., Streaming DiLoCo with overlapping communication, 2025, section
      2.3. arXiv:2501.18512
    """
    check_rule("interpolate(rule)", rule)
    alpha = check_number("interpolate(alpha)", "alpha", alpha, at_least=0, at_most=1)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        synced, state = rule.apply(tree, state, context)
        if not is_traced(alpha) and alpha == 0:
            return synced, state
        mixed = jax.tree.map(
            lambda x, t: x + (1 - alpha) * (t - x), promote(tree), promote(synced)
        )
        mixed = tree_cast_like(mixed, tree)
        return where(collectives.is_active(context), mixed, synced), state

    name = call_name("interpolate", rule, alpha=alpha)
    return SyncRule(rule.init, apply, name=name)
