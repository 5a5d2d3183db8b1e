"""Delayed Nesterov momentum for asynchronous updates."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from localsgd_jax.asynchronous.aggregation import (
    Aggregation,
    UpdateContext,
    pseudo_gradient,
    resolve_weighting,
)
from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check_int, check_number


class DelayedNesterov(NamedTuple):
    """State of `delayed_nesterov`.

    Attributes:
      count: number of updates applied, int32 scalar.
      momentum: m.
      buffer: Δ, sum of the pseudo-gradients since m last changed.
    """

    count: jax.Array
    momentum: PyTree
    buffer: PyTree


def delayed_nesterov(
    learning_rate: float,
    momentum: float = 0.9,
    *,
    buffer: int | None = None,
    activation: float = 0.0,
    weighting: Callable | None = None,
) -> Aggregation:
    """Applies each pseudo-gradient at once and the momentum every N updates.

    With g = −w(s) pₖ for the staleness s, update t = 1, 2, … computes

        Δ ← Δ + g
        m ← β m + Δ/N,   Δ ← 0                  if t mod N = 0
        a = 1 − c N + c  if t mod N = 0, else c
        z ← z − γ (a β m + g/N)

    The default c = 0 applies m once in N updates. With N = 1 the rule equals
    `server_optimizer(optax.sgd(γ, momentum=β, nesterov=True))`, except that its g is
    not divided by K.

    Args:
      learning_rate: γ, positive.
      momentum: β, in [0, 1).
      buffer: N, at least 1; None for K.
      activation: c, in [0, 1/N].
      weighting: function from the staleness to a weight; None for
        `constant_weighting()`.

    Returns:
      An aggregation whose state is a `DelayedNesterov`.

    Raises:
      TypeError: if the buffer is not an int, or the weighting not callable.
      ValueError: if a number is out of range. If N is K, the activation is checked
        when K is known.

    Example:
      >>> aggregation = delayed_nesterov(0.7, momentum=0.9)

    References:
      Liu et al., Asynchronous Local-SGD Training for Language Modeling, 2024,
      Algorithm 3. arXiv:2401.09135
    """
    weighting = resolve_weighting("delayed_nesterov(weighting)", weighting)
    _check_arguments(learning_rate, momentum, buffer, activation)

    def init(aggregate: PyTree) -> DelayedNesterov:
        zeros = jax.tree.map(jnp.zeros_like, aggregate)
        return DelayedNesterov(jnp.int32(0), zeros, jax.tree.map(jnp.copy, zeros))

    def apply(
        aggregate: PyTree,
        update: PyTree,
        state: DelayedNesterov,
        context: UpdateContext,
    ) -> tuple[PyTree, DelayedNesterov]:
        n = context.num_workers if buffer is None else buffer
        _check_activation(activation, n)
        count = state.count + 1
        due = count % n == 0
        gradient = pseudo_gradient(weighting, update, context.staleness)
        total = jax.tree.map(jnp.add, state.buffer, gradient)
        velocity = jax.tree.map(
            lambda m, d: jnp.where(due, momentum * m + d / n, m), state.momentum, total
        )
        total = jax.tree.map(lambda d: jnp.where(due, 0, d), total)
        factor = jnp.where(due, 1 - activation * n + activation, activation)
        step = jax.tree.map(
            lambda m, g: m + g / n,
            optax.tree_utils.tree_scale(factor * momentum, velocity),
            gradient,
        )
        aggregate = jax.tree.map(lambda z, s: z - learning_rate * s, aggregate, step)
        return aggregate, DelayedNesterov(count, velocity, total)

    return Aggregation(init, apply)


def _check_arguments(
    learning_rate: float, momentum: float, buffer: int | None, activation: float
) -> None:
    """Raises a ValueError if a number is out of range."""
    call = "delayed_nesterov"
    name = "learning_rate"
    check_number(f"{call}({name})", name, learning_rate, above=0)
    check_number(f"{call}(momentum)", "momentum", momentum, at_least=0, below=1)
    if buffer is not None:
        buffer = check_int(f"{call}(buffer)", "buffer", buffer, 1)
    _check_activation(activation, buffer or 1)


def _check_activation(activation: float, n: int) -> None:
    """Raises a ValueError unless 0 ≤ c ≤ 1/N.

    A larger c would apply the momentum more than once in N updates.
    """
    call, name = "delayed_nesterov(activation)", "activation"
    check_number(call, name, activation, at_least=0, at_most=1 / n)
