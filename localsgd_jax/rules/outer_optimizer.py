"""An outer optimizer on the mean pseudo-gradient: DiLoCo and its relatives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from localsgd_jax import checks, collectives
from localsgd_jax.base import Context, PyTree, Rows, RuleState, SyncRule
from localsgd_jax.rules.combine import check_rule
from localsgd_jax.rules.mean import average, check_has_mean
from localsgd_jax.trees import choose, flat, narrow, unflat, widen


class OuterState(NamedTuple):
    """What all workers remember of an outer optimizer, one copy.

    Attributes:
      anchor: x̄, the parameters agreed on last, in float32 at least.
      optimizer: the outer optimizer's state.
      reduce: what the reducing rule remembers.
    """

    anchor: PyTree
    optimizer: PyTree
    reduce: PyTree


def outer(
    optimizer: optax.GradientTransformation, reduce: SyncRule | str | None = None
) -> SyncRule:
    """Steps an optax optimizer along the mean pseudo-gradient.

    With the anchor x̄, on which all agreed last:

        Δₖ = x̄ − xₖ
        x̄ ← x̄ + optimizer(reduce(Δ₁, …, Δ_K))
        xₖ ← x̄

    The anchor and the optimizer's state are one copy that all share. Pseudo-gradients
    and the anchor are kept in float32 at least, whatever the parameters are. If nobody
    takes part nothing changes.

    Args:
      optimizer: any optax optimizer; its schedules count rounds. `optax.sgd(1.0)` gives
        the mean.
      reduce: how pseudo-gradients become one; None for `average()`, and the name of a
        worker axis for the average over it. What changes how they travel goes here,
        such as `quantize(average(), bits=4)`.

    Returns:
      A rule that moves what `reduce` moves.

    Raises:
      TypeError: if an argument is not what it must be; at `init`, for a leaf that has
        no mean.
      ValueError: when traced, if `reduce` does not make the workers agree.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.outer(optax.sgd(0.7, momentum=0.9, nesterov=True))   # DiLoCo
      >>> compressed = lsgd.outer(optax.adam(0.1), lsgd.quantize(lsgd.average(), 4))

    References:
      Douillard et al., DiLoCo: Distributed Low-Communication Training of Language
      Models, 2023, Algorithm 1. arXiv:2311.08105
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "outer(optimizer): an optax optimizer is needed, such as optax.sgd(0.7); "
            f"got {optimizer!r}"
        )
    if reduce is None or isinstance(reduce, str):
        reduce = average(reduce)
    check_rule("outer(reduce)", reduce)

    def init(tree: PyTree) -> RuleState:
        check_has_mean("outer()", tree)
        anchor = widen(tree)
        inner = reduce.init(anchor)
        agreed = OuterState(anchor, optimizer.init(anchor), inner.agreed)
        return RuleState(agreed, inner.own)

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        anchor, memory, reduced = state.agreed
        anyone, context = collectives.present(context)
        delta = jax.tree.map(jnp.subtract, anchor, widen(tree))
        gradient, inner = reduce.apply(delta, RuleState(reduced, state.own), context)
        if context.weight is not None:
            # A rule keeps what nobody weighs in, which here somebody always does.
            gradient, agreed = collectives.equal((gradient, inner.agreed))
            inner = RuleState(agreed, inner.own)
        updates, memory = optimizer.update(gradient, memory, anchor)
        moved = OuterState(optax.apply_updates(anchor, updates), memory, inner.agreed)
        after = choose(anyone, RuleState(moved, inner.own), state)
        return choose(anyone, narrow(moved.anchor, tree), tree), after

    return SyncRule(init, apply)


def diloco(learning_rate: float = 0.7, momentum: float = 0.9) -> SyncRule:
    """DiLoCo: Nesterov momentum on the mean pseudo-gradient.

        v ← μ v + Δ,   x̄ ← x̄ − η (Δ + μ v)

    Args:
      learning_rate: η, a number or an optax schedule over rounds.
      momentum: μ.

    Returns:
      `outer(optax.sgd(learning_rate, momentum, nesterov=True))`.

    Raises:
      ValueError: if the learning rate is not finite.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.diloco()

    References:
      Douillard et al., DiLoCo: Distributed Low-Communication Training of Language
      Models, 2023, Algorithm 1 and section 3. arXiv:2311.08105
    """
    _check_rate("diloco", learning_rate)
    return outer(optax.sgd(learning_rate, momentum, nesterov=True))


def slowmo(learning_rate: float = 1.0, momentum: float = 0.7) -> SyncRule:
    """SlowMo: heavy-ball momentum on the mean pseudo-gradient.

        u ← β u + Δ,   x̄ ← x̄ − α u

    The paper divides Δ by the inner learning rate γ and multiplies u by it, which for a
    constant γ is the same.

    Args:
      learning_rate: α, a number or an optax schedule over rounds.
      momentum: β; the paper tunes it between 0.4 and 0.8.

    Returns:
      `outer(optax.sgd(learning_rate, momentum))`.

    Raises:
      ValueError: if the learning rate is not finite.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.slowmo(momentum=0.6)

    References:
      Wang, Tantia, Ballas, Rabbat, SlowMo: Improving Communication-Efficient
      Distributed SGD with Slow Momentum, 2020, Algorithm 1. arXiv:1910.00643
    """
    _check_rate("slowmo", learning_rate)
    return outer(optax.sgd(learning_rate, momentum))


def fedavgm(learning_rate: float = 1.0, momentum: float = 0.9) -> SyncRule:
    """FedAvgM: server momentum on the mean pseudo-gradient.

        v ← β v + Δ,   x̄ ← x̄ − η v

    Args:
      learning_rate: η, a number or an optax schedule over rounds.
      momentum: β.

    Returns:
      `outer(optax.sgd(learning_rate, momentum))`.

    Raises:
      ValueError: if the learning rate is not finite.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.fedavgm(0.5)

    References:
      Hsu, Qi, Brown, Measuring the Effects of Non-Identical Data Distribution for
      Federated Visual Classification, 2019, section 4.3. arXiv:1909.06335
    """
    _check_rate("fedavgm", learning_rate)
    return outer(optax.sgd(learning_rate, momentum))


def fedadam(
    learning_rate: float = 0.1, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3
) -> SyncRule:
    """FedAdam: Adam on the mean pseudo-gradient, with a large ε.

        m ← β₁ m + (1 − β₁) Δ,   v ← β₂ v + (1 − β₂) Δ²
        x̄ ← x̄ − η m̂ / (√v̂ + τ)

    m̂ and v̂ are Adam's bias-corrected m and v; the paper's own have no correction, which
    fades with the rounds.

    Args:
      learning_rate: η, a number or an optax schedule over rounds.
      b1: β₁.
      b2: β₂.
      tau: τ, the degree of adaptivity.

    Returns:
      `outer(optax.adam(learning_rate, b1, b2, eps=tau))`.

    Raises:
      ValueError: if the learning rate is not finite.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.fedadam(0.01)

    References:
      Reddi et al., Adaptive Federated Optimization, 2021, Algorithm 2.
      arXiv:2003.00295
    """
    _check_rate("fedadam", learning_rate)
    return outer(optax.adam(learning_rate, b1, b2, eps=tau))


def lookahead(slow_step_size: float = 0.5) -> SyncRule:
    """Lookahead, for any number of workers: a step of some length towards the mean.

        x̄ ← x̄ − α Δ

    With one worker it equals `optax.lookahead`.

    Args:
      slow_step_size: α.

    Returns:
      `outer(optax.sgd(slow_step_size))`.

    Raises:
      ValueError: if the step size is not finite.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.lookahead()

    References:
      Zhang, Lucas, Hinton, Ba, Lookahead Optimizer: k steps forward, 1 step back, 2019,
      Algorithm 1. arXiv:1907.08610
    """
    _check_rate("lookahead", slow_step_size)
    return outer(optax.sgd(slow_step_size))


def shard(rule: SyncRule, workers: int) -> SyncRule:
    """Cuts a rule and all that it remembers into K pieces, one for each worker.

    Worker k owns piece k of the flattened tree, [·]ₖ:

        [x]ₖ ← rule([Σⱼ wⱼ xⱼ / Σⱼ wⱼ]ₖ)        reduce-scatter, then the rule alone
        x ← ([x]₁, …, [x]_K)                    all-gather

    The bytes of an all-reduce, and 1/K of the memory for anchor and moments. It equals
    the rule itself where that treats every number alone, as SGD, momentum and Adam do;
    clipping by a global norm would see its piece only.

    Args:
      rule: what an owner does to its piece, such as `outer(optax.adam(0.1))`.
      workers: K.

    Returns:
      A rule whose memory is `Rows`, a row for each worker.

    Raises:
      TypeError: if an argument is not what it must be.
      ValueError: if K is below 1; when traced, if there are not K workers.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.shard(lsgd.outer(optax.adam(0.1)), workers=8)

    References:
      Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter
      Models, 2020, section 5.1. arXiv:1910.02054
    """
    check_rule("shard(rule)", rule)
    checks.integer("shard(workers)", "the number of workers", workers, 1)

    def init(tree: PyTree) -> RuleState:
        check_has_mean("shard()", tree)
        return RuleState(own=Rows(jax.vmap(rule.init)(_pieces(flat(tree), workers))))

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        if (count := collectives.size(context)) != workers:
            raise ValueError(
                f"shard(workers): workers must be the {count} that meet, got {workers}"
            )
        anyone, somebody = collectives.present(context)
        vector = flat(tree)
        if somebody.weight is None:
            piece = collectives.scatter_sum(_pieces(vector, workers), context) / workers
        else:
            share = somebody.weight
            mine = jnp.where(share > 0, share * vector, 0)
            piece = collectives.scatter_sum(_pieces(mine, workers), context)
            piece = piece / collectives.total(share, context)
        alone = Context({}, context.round)
        piece, memory = rule.apply(piece, state.own.tree, alone)
        whole = collectives.gather(piece, context).reshape(-1)[: vector.size]
        after = RuleState(own=Rows(memory))
        return choose(anyone, unflat(whole, tree), tree), choose(anyone, after, state)

    return SyncRule(init, apply)


def _pieces(vector: jax.Array, workers: int) -> jax.Array:
    """Cuts a vector into a row for each worker, the last one filled up."""
    return jnp.pad(vector, (0, -vector.size % workers)).reshape(workers, -1)


def _check_rate(call: str, rate: float) -> None:
    """Refuses a step size that would make all parameters nonsense."""
    if not callable(rate) and not jnp.isfinite(rate):
        raise ValueError(f"{call}(learning_rate): it must be finite, got {rate}")
