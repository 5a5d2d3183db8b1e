"""Delayed Nesterov: a momentum for writes that come one at a time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from localsgd_jax.asynchronous.aggregation import (
    Aggregation,
    Arrival,
    as_weighting,
    times,
)
from localsgd_jax.asynchronous.checks import holds, whole
from localsgd_jax.base import PyTree


class DelayedNesterov(NamedTuple):
    """Memory of `delayed_nesterov`.

    Attributes:
      count: writes so far, int32 scalar.
      momentum: m.
      buffer: Δ, the pseudo-gradients since m last changed.
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
    """Descends at once along each pseudo-gradient, and seldom along a momentum.

    With g = −w(s) pₖ for the staleness s, the t-th write, t = 1, 2, …, does

        Δ ← Δ + g
        m ← β m + Δ/N,   Δ ← 0                  if t mod N = 0
        a = 1 − c N + c  if t mod N = 0, else c
        z ← z − γ (a β m + g/N)

    The default c = 0 applies m once in N writes. With N = 1 it is, but for the
    factor K in g, `outer(optax.sgd(γ, momentum=β, nesterov=True))`.

    Args:
      learning_rate: γ, positive.
      momentum: β, in [0, 1).
      buffer: N, at least 1; None for K.
      activation: c, in [0, 1/N].
      weighting: from the staleness to a weight; None for `constant()`.

    Returns:
      An aggregation with the memory `DelayedNesterov`.

    Raises:
      TypeError: if the buffer is not an int, or the weighting not callable.
      ValueError: if a number is out of range. Where N is K, the activation is
        checked when K is known.

    Example:
      >>> aggregation = delayed_nesterov(0.7, momentum=0.9)

    References:
      Liu et al., Asynchronous Local-SGD Training for Language Modeling, 2024.
      arXiv:2401.09135
    """
    weighting = as_weighting("delayed_nesterov(weighting)", weighting)
    _check_nesterov(learning_rate, momentum, buffer, activation)

    def init(aggregate: PyTree) -> DelayedNesterov:
        zeros = jax.tree.map(jnp.zeros_like, aggregate)
        return DelayedNesterov(jnp.int32(0), zeros, jax.tree.map(jnp.copy, zeros))

    def apply(
        aggregate: PyTree, progress: PyTree, memory: DelayedNesterov, arrival: Arrival
    ) -> tuple[PyTree, DelayedNesterov]:
        n = arrival.workers if buffer is None else buffer
        _check_activation(activation, n)
        count = memory.count + 1
        due = count % n == 0
        gradient = times(-weighting(arrival.missed), progress)
        total = jax.tree.map(jnp.add, memory.buffer, gradient)
        velocity = jax.tree.map(
            lambda m, d: jnp.where(due, momentum * m + d / n, m), memory.momentum, total
        )
        total = jax.tree.map(lambda d: jnp.where(due, 0, d), total)
        share = jnp.where(due, 1 - activation * n + activation, activation)
        step = jax.tree.map(
            lambda m, g: m + g / n, times(share * momentum, velocity), gradient
        )
        aggregate = jax.tree.map(lambda z, s: z - learning_rate * s, aggregate, step)
        return aggregate, DelayedNesterov(count, velocity, total)

    return Aggregation(init, apply)


def _check_nesterov(
    learning_rate: float, momentum: float, buffer: int | None, activation: float
) -> None:
    """Refuses numbers out of range."""
    call = "delayed_nesterov"
    holds(f"{call}(learning_rate)", "positive", learning_rate, learning_rate > 0)
    holds(f"{call}(momentum)", "in [0, 1)", momentum, 0 <= momentum < 1)
    if buffer is None:
        holds(f"{call}(activation)", "in [0, 1]", activation, 0 <= activation <= 1)
        return
    whole(f"{call}(buffer)", buffer)
    _check_activation(activation, buffer)


def _check_activation(activation: float, n: int) -> None:
    """Refuses a momentum that would be applied more than once in N writes."""
    holds(
        "delayed_nesterov(activation)",
        f"in [0, 1/N] with N = {n}",
        activation,
        0 <= activation <= 1 / n,
    )
