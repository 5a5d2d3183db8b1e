"""Eager outer steps: the own update at once, other updates a round later."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.tree_utils import tree_cast_like

from localsgd_jax.core import collectives
from localsgd_jax.core.averaging import average, check_inexact
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pytrees import promote, where
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check_optimizer, check_rule
from localsgd_jax.rules.common_result import check_common_result


class EagerState(NamedTuple):
    """Local state of `eager_outer`.

    Attributes:
      anchor: x̄ₖ, the parameters after the last outer step of this worker, in float32
        or wider.
      optimizer: state of its outer optimizer.
      delta: Δₖ of the round before, which this round sends.
      reduce: local state of the reducing rule.
    """

    anchor: PyTree
    optimizer: PyTree
    delta: PyTree
    reduce: PyTree


def eager_outer(
    optimizer: optax.GradientTransformation, reduce: SyncRule | None = None
) -> SyncRule:
    """Applies an outer optimizer to the own new and the others' last updates.

    With an anchor x̄ₖ for each worker and Δ′ₖ, the pseudo-gradient of the round before:

        Δₖ = x̄ₖ − xₖ
        gₖ = reduce(Δ′₁, …, Δ′_K) + (wₖ / Σⱼ wⱼ) (Δₖ − Δ′ₖ)
        x̄ₖ ← x̄ₖ + optimizer(gₖ),   xₖ ← x̄ₖ,   Δ′ₖ ← Δₖ

    What is sent exists before the local steps of the round, so that a program may send
    it while it computes them, as with `overlap`. Workers differ by their share of one
    round, and for optimizers that are linear in the gradient, such as SGD with
    momentum, not by more. A worker of weight 0 applies what the others have sent, and
    its own progress is lost. With one worker and `average()` it equals `outer`.

    Args:
      optimizer: any optax optimizer; its schedules count rounds.
      reduce: rule that reduces the pseudo-gradients to one value; None for
        `average()`. With a lossy rule such as `quantize`, gₖ contains Δ′ₖ of the
        worker itself with its error.

    Returns:
      A rule with anchor, optimizer state and update per worker. It communicates like
      `reduce`.

    Raises:
      TypeError: if `optimizer` is not an optax optimizer or `reduce` not a rule; at
        `init`, for a leaf that is not floating point or complex.
      ValueError: when traced, if workers differ after `reduce`.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.eager_outer(optax.sgd(0.7, momentum=0.9, nesterov=True))

    References:
      Kale, Douillard, Donchev, Eager Updates for Overlapped Communication and
      Computation in DiLoCo, 2025. arXiv:2502.12996. The equation follows its
      description in secondary sources.
    """
    check_optimizer("eager_outer(optimizer)", optimizer)
    reduce = average() if reduce is None else reduce
    check_rule("eager_outer(reduce)", reduce)

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        check_inexact("eager_outer()", tree)
        anchor = promote(tree)
        reduced = reduce.init(anchor, specs)
        zeros = jax.tree.map(jnp.zeros_like, anchor)
        local = EagerState(anchor, optimizer.init(anchor), zeros, reduced.local)
        return RuleState(reduced.shared, local)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        old: EagerState = state.local
        any_active, active_context = collectives.any_participants(context)
        delta = jax.tree.map(jnp.subtract, old.anchor, promote(tree))
        delta = where(
            collectives.is_active(context), delta, jax.tree.map(jnp.zeros_like, delta)
        )
        reduce_state = RuleState(state.shared, old.reduce)
        check_common_result(
            "eager_outer(reduce)", reduce, old.delta, reduce_state, active_context
        )
        others, reduced = reduce.apply(old.delta, reduce_state, active_context)
        shared = reduced.shared
        if context.weight is not None:
            # The weights of the active context are never all zero; see `outer`.
            others, shared = collectives.assume_replicated((others, shared))
        share = _share(active_context)
        gradient = jax.tree.map(
            lambda mean, new, last: mean + share.astype(mean.dtype) * (new - last),
            others,
            delta,
            old.delta,
        )
        updates, opt_state = optimizer.update(gradient, old.optimizer, old.anchor)
        anchor = optax.apply_updates(old.anchor, updates)
        new = EagerState(anchor, opt_state, delta, reduced.local)
        new_state = where(any_active, RuleState(shared, new), state)
        return where(any_active, tree_cast_like(anchor, tree), tree), new_state

    name = call_name("eager_outer", optimizer=optimizer, reduce=reduce)
    return SyncRule(init, apply, name=name)


def _share(context: SyncContext) -> jax.Array:
    """Returns the share of this worker in a mean, wₖ / Σⱼ wⱼ."""
    weights = collectives.gathered_weights(context)
    return weights[collectives.index(context)] / jnp.sum(weights)
