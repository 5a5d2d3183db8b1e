"""What a worker's progress does to the aggregate."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from localsgd_jax.asynchronous.checks import holds
from localsgd_jax.base import PyTree


class Arrival(NamedTuple):
    """What an aggregation knows about a write besides the progress in it.

    Attributes:
      workers: K.
      missed: staleness of the write, an int32 scalar: how many writes reached the
        aggregate after its worker had last read it and before this one. Writes of
        one instant do not make each other stale.
    """

    workers: int
    missed: jax.Array


class Aggregation(NamedTuple):
    """How a write changes the aggregate, one write at a time.

    With the progress pₖ = xₖ − rₖ of worker k since it read rₖ:

        z, memory ← apply(z, pₖ, memory, arrival)

    Attributes:
      init: `init(aggregate) -> memory`.
      apply: `apply(aggregate, progress, memory, arrival) -> (aggregate, memory)`.
    """

    init: Callable[[PyTree], PyTree]
    apply: Callable[[PyTree, PyTree, PyTree, Arrival], tuple[PyTree, PyTree]]


def add() -> Aggregation:
    """Adds a worker's share of its progress.

        z ← z + pₖ / K

    Returns:
      An aggregation without memory. No progress is lost or counted twice: when all
      writes have arrived, z is the start plus 1/K of all progress.

    Example:
      >>> import jax.numpy as jnp
      >>> arrival = Arrival(workers=4, missed=jnp.int32(0))
      >>> z, _ = add().apply(jnp.float32(1.0), jnp.float32(8.0), (), arrival)
      >>> float(z)
      3.0

    References:
      Stich, Local SGD Converges Fast and Communicates Little, 2019, Algorithm 2.
      arXiv:1805.09767
    """

    def apply(
        aggregate: PyTree, progress: PyTree, memory: PyTree, arrival: Arrival
    ) -> tuple[PyTree, PyTree]:
        share = jax.tree.map(lambda p: p / arrival.workers, progress)
        return jax.tree.map(jnp.add, aggregate, share), memory

    return Aggregation(lambda aggregate: (), apply)


def constant(value: float = 1.0) -> Callable:
    """Gives every write the same weight, however stale.

        w(s) = value

    Args:
      value: the weight, positive.

    Returns:
      A weighting for `outer` and `delayed_nesterov`.

    Raises:
      ValueError: if the value is not positive.

    Example:
      >>> constant()(7)
      1.0
    """
    holds("constant(value)", "positive", value, value > 0)
    return lambda missed: value


def polynomial(power: float = 0.5) -> Callable:
    """Weighs a write the less, the more writes it has missed.

        w(s) = (1 + s)^(−power)

    `polynomial(0)` equals `constant()`.

    Args:
      power: a, at least 0.

    Returns:
      A weighting for `outer` and `delayed_nesterov`.

    Raises:
      ValueError: if the power is negative.

    Example:
      >>> polynomial(0.5)(3)
      0.5

    References:
      Xie, Koyejo, Gupta, Asynchronous Federated Optimization, 2019.
      arXiv:1903.03934
    """
    holds("polynomial(power)", "at least 0", power, power >= 0)
    return lambda missed: (1.0 + missed) ** -power


def outer(
    optimizer: optax.GradientTransformation, weighting: Callable | None = None
) -> Aggregation:
    """Steps an optax optimizer along each worker's pseudo-gradient.

    With the weight w of the staleness s:

        g = −w(s) pₖ / K
        z ← z + optimizer(g)

    `outer(optax.sgd(1.0))` equals `add()`. An optimizer with momentum sees each
    write as a step of its own, K times as often as in the synchronous rule;
    `delayed_nesterov` is made for that.

    Args:
      optimizer: outer optimizer; g plays the part of the gradient.
      weighting: from the staleness to a weight; None for `constant()`.

    Returns:
      An aggregation whose memory is the optimizer's state.

    Raises:
      TypeError: if an argument is not what it must be.

    Example:
      >>> import optax
      >>> aggregation = outer(optax.sgd(0.7), weighting=polynomial(0.5))

    References:
      Liu et al., Asynchronous Local-SGD Training for Language Modeling, 2024.
      arXiv:2401.09135
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "outer(optimizer): an optax optimizer is needed, such as optax.sgd(0.7); "
            f"got {optimizer!r}"
        )
    weighting = as_weighting("outer(weighting)", weighting)

    def apply(
        aggregate: PyTree, progress: PyTree, memory: PyTree, arrival: Arrival
    ) -> tuple[PyTree, PyTree]:
        delta = times(-weighting(arrival.missed), progress)
        gradient = jax.tree.map(lambda d: d / arrival.workers, delta)
        updates, memory = optimizer.update(gradient, memory, aggregate)
        return optax.apply_updates(aggregate, updates), memory

    return Aggregation(optimizer.init, apply)


def check_aggregation(call: str, aggregation: Aggregation | None) -> Aggregation:
    """Returns the aggregation, `add()` for None; refuses what is none."""
    if aggregation is None:
        return add()
    if not isinstance(aggregation, Aggregation):
        raise TypeError(
            f"{call}: an Aggregation is needed, such as add(); got {aggregation!r}"
        )
    return aggregation


def times(factor: jax.Array | float, tree: PyTree) -> PyTree:
    """Multiplies a tree by a scalar, in the dtypes of the tree."""
    return jax.tree.map(lambda x: jnp.asarray(factor).astype(x.dtype) * x, tree)


def as_weighting(call: str, weighting: Callable | None) -> Callable:
    """Returns the weighting, `constant()` for None; refuses what is none."""
    if weighting is not None and not callable(weighting):
        raise TypeError(
            f"{call}: a function of the staleness is needed, such as polynomial(); "
            f"got {weighting!r}"
        )
    return weighting or constant()
