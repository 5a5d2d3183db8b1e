"""Outer optimizers on the mean pseudo-gradient: DiLoCo, SlowMo, FedAvgM, FedAdam."""

import dataclasses
from collections.abc import Callable
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
from localsgd_jax.core.validation import (
    check_names,
    check_number,
    check_optimizer,
    check_rule,
)
from localsgd_jax.rules.common_result import check_common_result

LearningRate = float | Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]


class OuterState(NamedTuple):
    """Shared state of `outer`.

    Attributes:
      anchor: x̄, the synchronised parameters of the last round, in float32 or wider.
      optimizer: state of the outer optimizer.
      reduce: shared state of the reducing rule.
    """

    anchor: PyTree
    optimizer: PyTree
    reduce: PyTree


def outer(
    optimizer: optax.GradientTransformation, reduce: SyncRule | str | None = None
) -> SyncRule:
    """Applies an optax optimizer to the mean pseudo-gradient.

    With the anchor x̄, the synchronised parameters of the last round:

        Δₖ = x̄ − xₖ
        x̄ ← x̄ + optimizer(reduce(Δ₁, …, Δ_K))
        xₖ ← x̄

    The anchor and the optimizer's state are shared: there is one copy for all workers.
    Pseudo-gradients and the anchor are kept in float32 or wider, whatever the dtype of
    the parameters. If all weights are 0, nothing changes.

    Args:
      optimizer: any optax optimizer; its schedules count rounds. `optax.sgd(1.0)` gives
        the mean.
      reduce: rule that reduces the pseudo-gradients to one value; None for `average()`,
        or the name of a worker axis for the average over it. Compression goes here,
        such as `quantize(average(), bits=4)`.

    Returns:
      A rule that communicates like `reduce`.

    Raises:
      TypeError: if `optimizer` is not an optax optimizer or `reduce` not a rule; at
        `init`, for a leaf that is not floating point or complex.
      ValueError: when traced, if the result of `reduce` is not the same for all
        workers.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.outer(optax.sgd(0.7, momentum=0.9, nesterov=True))   # DiLoCo
      >>> compressed = lsgd.outer(optax.adam(0.1), lsgd.quantize(lsgd.average(), 4))

    References:
      Douillard et al., DiLoCo: Distributed Low-Communication Training of Language
      Models, 2023, Algorithm 1. arXiv:2311.08105
    """
    check_optimizer("outer(optimizer)", optimizer)
    if isinstance(reduce, str):
        check_names("outer(reduce)", "reduce", reduce)
    if reduce is None or isinstance(reduce, str):
        reduce = average(reduce)
    check_rule("outer(reduce)", reduce)

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        check_inexact("outer()", tree)
        anchor = promote(tree)
        reduce_state = reduce.init(anchor, specs)
        shared = OuterState(anchor, optimizer.init(anchor), reduce_state.shared)
        return RuleState(shared, reduce_state.local)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        anchor, opt_state, reduce_shared = state.shared
        any_active, context = collectives.any_participants(context)
        delta = jax.tree.map(jnp.subtract, anchor, promote(tree))
        reduce_state = RuleState(reduce_shared, state.local)
        gradient, reduced = reduce.apply(delta, reduce_state, context)
        if context.weight is not None:
            check_common_result("outer(reduce)", reduce, delta, reduce_state, context)
            # With weights, a rule selects between its result and its input, which
            # differs between workers, for the case that all weights are zero. The
            # weights of this context are never all zero.
            gradient, shared = collectives.assume_replicated((gradient, reduced.shared))
            reduced = RuleState(shared, reduced.local)
        updates, opt_state = optimizer.update(gradient, opt_state, anchor)
        new = OuterState(
            optax.apply_updates(anchor, updates), opt_state, reduced.shared
        )
        new_state = where(any_active, RuleState(new, reduced.local), state)
        return where(any_active, tree_cast_like(new.anchor, tree), tree), new_state

    return SyncRule(
        init, apply, name=call_name("outer", optimizer=optimizer, reduce=reduce)
    )


def diloco(learning_rate: LearningRate = 0.7, momentum: float = 0.9) -> SyncRule:
    """Applies Nesterov momentum to the mean pseudo-gradient (DiLoCo).

        v ← μ v + Δ,   x̄ ← x̄ − η (Δ + μ v)

    Args:
      learning_rate: η, a number ≥ 0 or an optax schedule over rounds.
      momentum: μ, in [0, 1).

    Returns:
      `outer(optax.sgd(learning_rate, momentum, nesterov=True))`.

    Raises:
      TypeError: if an argument is not a number.
      ValueError: if a number is out of range.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.diloco()

    References:
      Douillard et al., DiLoCo: Distributed Low-Communication Training of Language
      Models, 2023, Algorithm 1 and section 3. arXiv:2311.08105
    """
    check_rate("diloco", "learning_rate", learning_rate)
    _check_decay("diloco", "momentum", momentum)
    rule = outer(optax.sgd(learning_rate, momentum, nesterov=True))
    return _named(rule, "diloco", learning_rate=learning_rate, momentum=momentum)


def slowmo(learning_rate: LearningRate = 1.0, momentum: float = 0.7) -> SyncRule:
    """Applies heavy-ball momentum to the mean pseudo-gradient (SlowMo).

        u ← β u + Δ,   x̄ ← x̄ − α u

    The paper divides Δ by the inner learning rate γ and multiplies u by it. For a
    constant γ this is the same.

    Args:
      learning_rate: α, a number ≥ 0 or an optax schedule over rounds.
      momentum: β, in [0, 1); the paper tunes it between 0.4 and 0.8.

    Returns:
      `outer(optax.sgd(learning_rate, momentum))`.

    Raises:
      TypeError: if an argument is not a number.
      ValueError: if a number is out of range.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.slowmo(momentum=0.6)

    References:
      Wang, Tantia, Ballas, Rabbat, SlowMo: Improving Communication-Efficient
      Distributed SGD with Slow Momentum, 2020, Algorithm 1. arXiv:1910.00643
    """
    check_rate("slowmo", "learning_rate", learning_rate)
    _check_decay("slowmo", "momentum", momentum)
    rule = outer(optax.sgd(learning_rate, momentum))
    return _named(rule, "slowmo", learning_rate=learning_rate, momentum=momentum)


def fedavgm(learning_rate: LearningRate = 1.0, momentum: float = 0.9) -> SyncRule:
    """Applies server momentum to the mean pseudo-gradient (FedAvgM).

        v ← β v + Δ,   x̄ ← x̄ − η v

    Args:
      learning_rate: η, a number ≥ 0 or an optax schedule over rounds.
      momentum: β, in [0, 1).

    Returns:
      `outer(optax.sgd(learning_rate, momentum))`.

    Raises:
      TypeError: if an argument is not a number.
      ValueError: if a number is out of range.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.fedavgm(0.5)

    References:
      Hsu, Qi, Brown, Measuring the Effects of Non-Identical Data Distribution for
      Federated Visual Classification, 2019, section 4.3. arXiv:1909.06335
    """
    check_rate("fedavgm", "learning_rate", learning_rate)
    _check_decay("fedavgm", "momentum", momentum)
    rule = outer(optax.sgd(learning_rate, momentum))
    return _named(rule, "fedavgm", learning_rate=learning_rate, momentum=momentum)


def fedadam(
    learning_rate: LearningRate = 0.1,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
) -> SyncRule:
    """Applies Adam with a large ε to the mean pseudo-gradient (FedAdam).

        m ← β₁ m + (1 − β₁) Δ,   v ← β₂ v + (1 − β₂) Δ²
        x̄ ← x̄ − η m̂ / (√v̂ + τ)

    m̂ and v̂ are the bias-corrected m and v of Adam. The paper has no bias correction;
    its effect vanishes with the number of rounds.

    Args:
      learning_rate: η, a number ≥ 0 or an optax schedule over rounds.
      b1: β₁, in [0, 1).
      b2: β₂, in [0, 1).
      tau: τ, the degree of adaptivity, positive.

    Returns:
      `outer(optax.adam(learning_rate, b1, b2, eps=tau))`.

    Raises:
      TypeError: if an argument is not a number.
      ValueError: if a number is out of range.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.fedadam(0.01)

    References:
      Reddi et al., Adaptive Federated Optimization, 2021, Algorithm 2.
      arXiv:2003.00295
    """
    check_rate("fedadam", "learning_rate", learning_rate)
    _check_decay("fedadam", "b1", b1)
    _check_decay("fedadam", "b2", b2)
    check_number("fedadam(tau)", "tau", tau, above=0)
    rule = outer(optax.adam(learning_rate, b1, b2, eps=tau))
    return _named(rule, "fedadam", learning_rate=learning_rate, b1=b1, b2=b2, tau=tau)


def lookahead(slow_step_size: LearningRate = 0.5) -> SyncRule:
    """Moves the workers a fraction of the way to their mean (Lookahead).

        x̄ ← x̄ − α Δ

    Works for any number of workers. With one worker it equals `optax.lookahead`.

    Args:
      slow_step_size: α, a number ≥ 0 or an optax schedule over rounds.

    Returns:
      `outer(optax.sgd(slow_step_size))`.

    Raises:
      TypeError: if the step size is not a number.
      ValueError: if it is negative or not finite.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.lookahead()

    References:
      Zhang, Lucas, Hinton, Ba, Lookahead Optimizer: k steps forward, 1 step back, 2019,
      Algorithm 1. arXiv:1907.08610
    """
    check_rate("lookahead", "slow_step_size", slow_step_size)
    rule = outer(optax.sgd(slow_step_size))
    return _named(rule, "lookahead", slow_step_size=slow_step_size)


def snoo(learning_rate: LearningRate = 0.7, momentum: float = 0.5) -> SyncRule:
    """Applies Nesterov momentum to the progress of a single worker (SNOO).

        v ← μ v + Δ,   x̄ ← x̄ − η (Δ + μ v)

    The equation is that of `diloco`, for K = 1 and with another momentum: nothing is
    sent, and the outer step smooths the steps of the inner optimizer. The published
    period is 30 local steps.

    Args:
      learning_rate: η, a number ≥ 0 or an optax schedule over rounds.
      momentum: μ.

    Returns:
      `outer(optax.sgd(learning_rate, momentum, nesterov=True))`.

    Raises:
      ValueError: if the learning rate is not finite.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> loss_fn = lambda w, batch: jnp.mean((w - batch) ** 2)
      >>> algorithm = lsgd.local_sgd(loss_fn, optax.adamw(1e-3), lsgd.snoo())
      >>> cluster, schedule = lsgd.simulate(algorithm, workers=1), lsgd.every(30)

    References:
      SNOO: Step-K Nesterov Outer Optimizer, 2025. arXiv:2510.15830. The defaults are
      those of a public training record that uses it.
    """
    check_rate("snoo", "learning_rate", learning_rate)
    _check_decay("snoo", "momentum", momentum)
    rule = outer(optax.sgd(learning_rate, momentum, nesterov=True))
    return _named(rule, "snoo", learning_rate=learning_rate, momentum=momentum)


def _named(rule: SyncRule, function: str, **arguments: object) -> SyncRule:
    """Replaces the name of a rule by that of a recipe."""
    return dataclasses.replace(rule, name=call_name(function, **arguments))


def check_rate(function: str, name: str, rate: LearningRate) -> None:
    """Raises unless a step size is a schedule, or finite and not negative."""
    if not callable(rate):
        check_number(f"{function}({name})", name, rate, at_least=0)


def _check_decay(function: str, name: str, value: float) -> None:
    """Raises unless the decay of a moving average is in [0, 1)."""
    check_number(f"{function}({name})", name, value, at_least=0, below=1)
