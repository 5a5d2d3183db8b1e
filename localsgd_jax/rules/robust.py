"""Robust aggregation: coordinate-wise median, trimmed mean and outlier removal."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from localsgd_jax.core import collectives
from localsgd_jax.core.averaging import check_floating, check_inexact
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pieces import Piece, map_vectors
from localsgd_jax.core.pytrees import join_rows, promote, where
from localsgd_jax.core.types import (
    PyTree,
    RuleMetrics,
    RuleState,
    SyncContext,
    SyncRule,
)
from localsgd_jax.core.validation import check_int, check_number, check_rule
from localsgd_jax.rules.codecs import row_multiple, split_tiles
from localsgd_jax.rules.common_result import check_common_result


class OutlierState(NamedTuple):
    """Shared state of `drop_outliers`.

    Attributes:
      anchor: x̄, the synchronised parameters of the last round.
      mean: m, running mean of log ‖Δ‖ over inliers and rounds, a float32 scalar.
      variance: s², running variance of log ‖Δ‖, a float32 scalar.
      rounds: number of rounds in the running moments, an int32 scalar.
      metrics: "dropped_workers", number of workers dropped so far, an int32 scalar.
      rule: shared state of the inner rule.
    """

    anchor: PyTree
    mean: jax.Array
    variance: jax.Array
    rounds: jax.Array
    metrics: RuleMetrics
    rule: PyTree


def median() -> SyncRule:
    """Replaces every number by its median over workers.

        xₖ ← median(x₁, …, x_K), coordinate by coordinate

    Workers of weight 0 are dropped; all positive weights are equivalent. For an even
    number of workers the result is the mean of the two middle values. Each worker sorts
    one chunk of the vector. An all-to-all and an all-gather send as many bytes as
    `average()`; sorting takes many times as long as a mean.

    Returns:
      A rule without state.

    Raises:
      TypeError: at `init`, for a leaf that is not floating point.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.outer(optax.sgd(1.0), lsgd.median())

    References:
      Yin, Chen, Ramchandran, Bartlett, Byzantine-Robust Distributed Learning: Towards
      Optimal Statistical Rates, 2018, Definition 1. arXiv:1803.01498
    """

    def median_of_sorted(values: jax.Array, num_active: jax.Array) -> jax.Array:
        low, high = (num_active - 1) // 2, num_active // 2
        return (values[low] + values[high]) / 2

    return _coordinatewise("median()", median_of_sorted, call_name("median"))


def trimmed_mean(fraction: float) -> SyncRule:
    """Averages every number over workers without the largest and smallest values.

        xₖ ← mean of x₍ᵣ₊₁₎ ≤ … ≤ x₍K₋ᵣ₎,   r = ⌊fraction · K⌋

    coordinate by coordinate. Workers of weight 0 are dropped and not counted in K; all
    positive weights are equivalent. Sends as many bytes as `average()`.

    Args:
      fraction: fraction of the workers to drop at each end, in [0, ½).

    Returns:
      A rule without state.

    Raises:
      TypeError: at `init`, for a leaf that is not floating point.
      ValueError: if the fraction is outside [0, ½).

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.outer(optax.sgd(1.0), lsgd.trimmed_mean(0.25))

    References:
      Yin, Chen, Ramchandran, Bartlett, Byzantine-Robust Distributed Learning: Towards
      Optimal Statistical Rates, 2018, Definition 2. arXiv:1803.01498
    """
    call, name = "trimmed_mean(fraction)", "fraction"
    fraction = check_number(call, name, fraction, at_least=0, below=0.5)

    def trimmed_mean_of_sorted(values: jax.Array, num_active: jax.Array) -> jax.Array:
        # The tolerance keeps exact integer products integer in float32.
        drop = jnp.floor(fraction * num_active + 1e-4).astype(jnp.int32)
        rank = jnp.arange(len(values))[:, None, None]
        kept = (rank >= drop) & (rank < num_active - drop)
        return jnp.sum(jnp.where(kept, values, 0), axis=0) / (num_active - 2 * drop)

    name = call_name("trimmed_mean", fraction=fraction)
    return _coordinatewise("trimmed_mean()", trimmed_mean_of_sorted, name)


def drop_outliers(
    rule: SyncRule, threshold: float = 3.0, decay: float = 0.9, warm_up: int = 5
) -> SyncRule:
    """Drops workers with non-finite or unusually large updates for one round.

    With the anchor x̄, the synchronised parameters of the last round, and Δₖ = x̄ − xₖ,
    worker k gets weight 0 if Δₖ is not finite, or, after `warm_up` rounds, if

        zₖ = (log ‖Δₖ‖ − m) / s > threshold

    m is a running mean over rounds of the mean of log ‖Δ‖ over inliers, and s² a
    running mean of the mean squared distance of log ‖Δ‖ to m. All workers decide from
    the same K numbers, so the decision is the same for all. A dropped worker continues
    from the result of the others. If all workers are dropped, nothing changes, except
    that non-finite workers are reset to the anchor. The history column
    "dropped_workers" counts the dropped workers.

    Args:
      rule: the rule for the other workers, after which all workers are equal, such as
        `average()` or `diloco()`.
      threshold: largest z, positive.
      decay: decay of the running means, in [0, 1).
      warm_up: number of rounds in which only non-finite workers are dropped.

    Returns:
      A rule that sends one number per worker in addition to the messages of `rule`.

    Raises:
      TypeError: if `rule` is not a rule; at `init`, for a leaf that is not floating
        point or complex; if the warm-up is not an int.
      ValueError: if a number is out of range; when traced, if workers may differ after
        `rule`.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.drop_outliers(lsgd.diloco())

    References:
      Cheng et al., EDiT: A Local-SGD-Based Efficient Distributed Training Method for
      Large Language Models, 2024, section 3.3. arXiv:2412.07210
    """
    call = "drop_outliers"
    check_rule(f"{call}(rule)", rule)
    threshold = check_number(f"{call}(threshold)", "threshold", threshold, above=0)
    decay = check_number(f"{call}(decay)", "decay", decay, at_least=0, below=1)
    warm_up = check_int(f"{call}(warm_up)", "warm_up", warm_up, 0)

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        check_inexact(f"{call}()", tree)
        inner, zero, count = rule.init(tree, specs), jnp.float32(0), jnp.int32(0)
        metrics = RuleMetrics({"dropped_workers": count})
        shared = OutlierState(tree, zero, zero, count, metrics, inner.shared)
        return RuleState(shared, inner.local)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        old = state.shared
        rule_state = RuleState(old.rule, state.local)
        check_common_result(f"{call}(rule)", rule, tree, rule_state, context)
        log_norms = _log_norms(old.anchor, tree, context)
        weights = collectives.gathered_weights(context)
        inliers = (weights > 0) & jnp.isfinite(log_norms)
        z = (log_norms - old.mean) / jnp.sqrt(old.variance + 1e-12)
        inliers &= (z <= threshold) | (old.rounds < warm_up)
        any_inlier = jnp.any(inliers)
        weight = jnp.where(inliers, weights, 0)[collectives.index(context)]
        synced, inner = rule.apply(tree, rule_state, context._replace(weight=weight))
        new = _update_moments(old, log_norms, inliers, decay)._replace(
            anchor=collectives.assume_replicated(synced), rule=inner.shared
        )
        kept = where(any_inlier, RuleState(new, inner.local), state)
        dropped = jnp.sum((weights > 0) & ~inliers, dtype=jnp.int32)
        total = old.metrics.scalars["dropped_workers"] + dropped
        metrics = RuleMetrics({"dropped_workers": total})
        new_state = kept._replace(shared=kept.shared._replace(metrics=metrics))
        # If every worker is dropped, non-finite workers are reset to the anchor.
        restored = where(jnp.isfinite(_norm(tree)), tree, old.anchor)
        return where(any_inlier, synced, restored), new_state

    name = call_name(call, rule, threshold=threshold, decay=decay, warm_up=warm_up)
    return SyncRule(init, apply, name=name)


def _update_moments(
    state: OutlierState, log_norms: jax.Array, inliers: jax.Array, decay: float
) -> OutlierState:
    """Updates the running mean and variance of log ‖Δ‖ with one round."""
    count = jnp.maximum(jnp.sum(inliers), 1)
    first = state.rounds == 0

    def running_mean(old: jax.Array, values: jax.Array) -> jax.Array:
        value = jnp.sum(jnp.where(inliers, values, 0)) / count
        return jnp.where(first, value, decay * old + (1 - decay) * value)

    mean = running_mean(state.mean, log_norms)
    variance = running_mean(state.variance, (log_norms - mean) ** 2)
    return state._replace(mean=mean, variance=variance, rounds=state.rounds + 1)


def _log_norms(anchor: PyTree, tree: PyTree, context: SyncContext) -> jax.Array:
    """Returns log ‖Δₖ‖ of all workers, (K,), NaN if Δₖ is not finite."""
    norm = _norm(jax.tree.map(jnp.subtract, promote(anchor), promote(tree)))
    # The lower bound gives a worker that did not move a finite logarithm.
    log = jnp.log(jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    return collectives.all_gather(jnp.where(jnp.isfinite(norm), log, jnp.nan), context)


def _norm(tree: PyTree) -> jax.Array:
    """Returns the Euclidean norm of a tree, a float32 scalar."""
    return optax.tree.norm(promote(tree)).astype(jnp.float32)


def _coordinatewise(call: str, combine: Callable, name: str) -> SyncRule:
    """Makes a rule from a function of the sorted values of one coordinate.

    Args:
      call: the public function, for messages.
      combine: `combine(values, num_active) -> result`, from `(K, r, w)`, sorted
        over workers with inactive ones at the end, to `(r, w)`.
      name: name of the rule.

    Returns:
      A rule without state.
    """

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        check_floating(call, tree)
        return RuleState()

    def exchange(piece: Piece, vector: jax.Array) -> tuple[jax.Array]:
        context = piece.context
        count = collectives.size(context)
        rows = split_tiles(vector, count, row_multiple(1, vector.size // count))
        values = collectives.all_to_all(rows, context)
        active = collectives.gathered_weights(context) > 0
        values = jnp.sort(jnp.where(active[:, None, None], values, jnp.inf), axis=0)
        chunk = combine(values, jnp.maximum(jnp.sum(active), 1))
        return (join_rows(collectives.all_gather(chunk, context), vector.size),)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        if not jax.tree.leaves(tree):
            return tree, state
        any_active, _ = collectives.any_participants(context)
        (combined,) = map_vectors(exchange, context, tree)
        return where(any_active, combined, tree), state

    return SyncRule(init, apply, name=name)
