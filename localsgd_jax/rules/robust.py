"""Agreement in spite of a few: medians, trimmed means, and a guard at the door."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from localsgd_jax import collectives
from localsgd_jax.base import Context, Notes, PyTree, RuleState, SyncRule
from localsgd_jax.rules.combine import check_rule
from localsgd_jax.rules.compression import cut
from localsgd_jax.rules.mean import check_has_mean
from localsgd_jax.trees import choose, flat, unflat, widen


class Watch(NamedTuple):
    """What `guard` remembers, one copy.

    Attributes:
      anchor: what was agreed on last.
      mean: running mean of log ‖Δ‖ over those who took part.
      variance: running variance of it.
      rounds: how many have been seen.
      notes: "left_out", workers left out so far, an int32 scalar.
      rule: what the guarded rule remembers.
    """

    anchor: PyTree
    mean: jax.Array
    variance: jax.Array
    rounds: jax.Array
    notes: Notes
    rule: PyTree


def median() -> SyncRule:
    """Replaces every number by its median over workers.

        xₖ ← median(x₁, …, x_K), coordinate by coordinate

    Workers of weight 0 are left out; other weights count alike. An even number of
    workers gives the mean of the two in the middle. Each worker sorts a piece of the
    vector, so this moves what `average()` moves: an all-to-all and an all-gather. It
    saves no bytes, and sorting costs many times a mean.

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

    def middle(ordered: jax.Array, alive: jax.Array) -> jax.Array:
        low, high = (alive - 1) // 2, alive // 2
        return (ordered[low] + ordered[high]) / 2

    return _by_order("median()", middle)


def trimmed_mean(fraction: float) -> SyncRule:
    """Averages every number over workers without the largest and smallest.

        xₖ ← mean of x₍ᵣ₊₁₎ ≤ … ≤ x₍K₋ᵣ₎,   r = ⌊fraction · K⌋

    coordinate by coordinate. Workers of weight 0 are left out and not counted in K;
    other weights count alike. Moves what `average()` moves.

    Args:
      fraction: share to leave out at either end, in [0, ½).

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
    if not 0 <= fraction < 0.5:
        raise ValueError(
            f"trimmed_mean(fraction): it must be in [0, 0.5), got {fraction}"
        )

    def inside(ordered: jax.Array, alive: jax.Array) -> jax.Array:
        # The slack keeps a product that is whole on paper whole in float32.
        drop = jnp.floor(fraction * alive + 1e-4).astype(jnp.int32)
        rank = jnp.arange(len(ordered))[:, None]
        kept = (rank >= drop) & (rank < alive - drop)
        return jnp.sum(jnp.where(kept, ordered, 0), axis=0) / (alive - 2 * drop)

    return _by_order("trimmed_mean()", inside)


def guard(
    rule: SyncRule, threshold: float = 3.0, decay: float = 0.9, warm_up: int = 5
) -> SyncRule:
    """Leaves out, for one round, a worker that has gone astray.

    With the anchor x̄ that was agreed on last, and Δₖ = x̄ − xₖ, a worker gets weight 0
    if Δₖ is not finite, or, after some rounds, if it is too long against what is usual:

        zₖ = (log ‖Δₖ‖ − m) / s > threshold

    where m and s² are running means over rounds of the mean of log ‖Δ‖ over those who
    take part and of its squared distance to m. All workers decide from the same K
    numbers, so they agree on who takes part; who is left out goes on from what the
    others agree on. The column "left_out" of the history counts them. The rule must
    make workers agree.

    Args:
      rule: what the others do, such as `average()` or `diloco()`.
      threshold: largest z.
      decay: of the running means, in [0, 1).
      warm_up: rounds in which only what is not finite is left out.

    Returns:
      A rule that moves a number for each worker more than `rule`.

    Raises:
      TypeError: if `rule` is not a rule.
      ValueError: if a number is out of range.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.guard(lsgd.diloco())

    References:
      Cheng et al., EDiT: A Local-SGD-Based Efficient Distributed Training Method for
      Large Language Models, 2024, section 3.3. arXiv:2412.07210
    """
    check_rule("guard(rule)", rule)
    if not threshold > 0:
        raise ValueError(f"guard(threshold): it must be positive, got {threshold}")
    if not 0 <= decay < 1:
        raise ValueError(f"guard(decay): it must be in [0, 1), got {decay}")
    if warm_up < 0:
        raise ValueError(f"guard(warm_up): it must be at least 0, got {warm_up}")

    def init(tree: PyTree) -> RuleState:
        check_has_mean("guard()", tree)
        inner, zero, none = rule.init(tree), jnp.float32(0), jnp.int32(0)
        notes = Notes({"left_out": none})
        watch = Watch(tree, zero, zero, none, notes, inner.agreed)
        return RuleState(watch, inner.own)

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        watch = state.agreed
        lengths = _log_lengths(watch.anchor, tree, context)
        share = collectives.shares(context)
        fine = (share > 0) & jnp.isfinite(lengths)
        z = (lengths - watch.mean) / jnp.sqrt(watch.variance + 1e-12)
        fine &= (z <= threshold) | (watch.rounds < warm_up)
        anyone = jnp.any(fine)
        weight = jnp.where(fine, share, 0)[collectives.index(context)]
        agreed, inner = rule.apply(
            tree, RuleState(watch.rule, state.own), context._replace(weight=weight)
        )
        left_out = jnp.sum((share > 0) & ~fine, dtype=jnp.int32)
        notes = Notes({"left_out": watch.notes.numbers["left_out"] + left_out})
        seen = _seen(watch, lengths, fine, decay)._replace(
            anchor=collectives.equal(agreed), rule=inner.agreed
        )
        kept = choose(anyone, RuleState(seen, inner.own), state)
        counted = kept.agreed._replace(notes=notes)
        # A worker that nobody is left to lead back goes back by itself.
        back = choose(jnp.isfinite(_length(tree)), tree, watch.anchor)
        return choose(anyone, agreed, back), RuleState(counted, kept.own)

    return SyncRule(init, apply)


def _seen(watch: Watch, lengths: jax.Array, fine: jax.Array, decay: float) -> Watch:
    """Moves the running mean and variance by one round."""
    count = jnp.maximum(jnp.sum(fine), 1)
    mean = jnp.sum(jnp.where(fine, lengths, 0)) / count
    first = watch.rounds == 0
    m = jnp.where(first, mean, decay * watch.mean + (1 - decay) * mean)
    square = jnp.sum(jnp.where(fine, (lengths - m) ** 2, 0)) / count
    v = jnp.where(first, square, decay * watch.variance + (1 - decay) * square)
    return watch._replace(mean=m, variance=v, rounds=watch.rounds + 1)


def _log_lengths(anchor: PyTree, tree: PyTree, context: Context) -> jax.Array:
    """Returns log ‖Δₖ‖ of all workers, (K,)."""
    delta = jax.tree.map(jnp.subtract, widen(anchor), widen(tree))
    length = _length(delta)
    # A worker that did not move is no outlier, and has a logarithm.
    log = jnp.log(jnp.maximum(length, jnp.finfo(jnp.float32).tiny))
    return collectives.gather(jnp.where(jnp.isfinite(length), log, jnp.nan), context)


def _length(tree: PyTree) -> jax.Array:
    """Returns the Euclidean norm of a tree."""
    squares = [jnp.sum(jnp.square(jnp.abs(x))) for x in jax.tree.leaves(widen(tree))]
    return jnp.sqrt(sum(squares)).astype(jnp.float32)


def _by_order(call: str, combine: Callable) -> SyncRule:
    """Makes a rule from what it does to K sorted numbers of which some count."""

    def init(tree: PyTree) -> RuleState:
        check_has_mean(call, tree)
        return RuleState()

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        anyone, _ = collectives.present(context)
        vector = flat(tree)
        rows = cut(vector, collectives.size(context))
        values = collectives.transpose(rows, context)
        present = collectives.shares(context) > 0
        ordered = jnp.sort(jnp.where(present[:, None], values, jnp.inf), axis=0)
        piece = combine(ordered, jnp.maximum(jnp.sum(present), 1))
        whole = collectives.gather(piece, context).reshape(-1)[: vector.size]
        return choose(anyone, unflat(whole, tree), tree), state

    return SyncRule(init, apply)
