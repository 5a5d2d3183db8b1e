"""Server update rules for asynchronous Local SGD."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import (
    check_number,
    check_optimizer,
    check_type,
    describe,
)


class UpdateContext(NamedTuple):
    """Arguments of an aggregation besides the update.

    Attributes:
      num_workers: K.
      staleness: int32 scalar; number of updates applied to the aggregate after the
        worker last pulled it and before this update. Simultaneous updates do not
        make each other stale.
    """

    num_workers: int
    staleness: jax.Array


class Aggregation(NamedTuple):
    """Server update rule, applied to one update at a time.

    With the update pₖ = xₖ − rₖ of worker k since it last pulled the aggregate, rₖ:

        z, aggregation_state ← apply(z, pₖ, aggregation_state, context)

    Attributes:
      init: `init(aggregate) -> aggregation_state`.
      apply: `apply(aggregate, update, aggregation_state, context) -> (aggregate,
        aggregation_state)`, with an `UpdateContext`.
    """

    init: Callable[[PyTree], PyTree]
    apply: Callable[[PyTree, PyTree, PyTree, UpdateContext], tuple[PyTree, PyTree]]


def mean_update() -> Aggregation:
    """Adds 1/K of each update to the aggregate.

        z ← z + pₖ / K

    Returns:
      An aggregation without state. Every update is applied exactly once: after all
      updates have been applied, z is the initial value plus 1/K of their sum.

    Example:
      >>> import jax.numpy as jnp
      >>> context = UpdateContext(num_workers=4, staleness=jnp.int32(0))
      >>> z, _ = mean_update().apply(jnp.float32(1.0), jnp.float32(8.0), (), context)
      >>> float(z)
      3.0

    References:
      Stich, Local SGD Converges Fast and Communicates Little, 2019, Algorithm 2.
      arXiv:1805.09767
    """

    def apply(
        aggregate: PyTree, update: PyTree, state: PyTree, context: UpdateContext
    ) -> tuple[PyTree, PyTree]:
        mean = jax.tree.map(lambda p: p / context.num_workers, update)
        return jax.tree.map(jnp.add, aggregate, mean), state

    return Aggregation(lambda aggregate: (), apply)


def constant_weighting(value: float = 1.0) -> Callable:
    """Returns a constant staleness weighting.

        w(s) = value

    Args:
      value: the weight, positive.

    Returns:
      A weighting for `server_optimizer` and `delayed_nesterov`.

    Raises:
      ValueError: if the value is not positive.

    Example:
      >>> constant_weighting()(7)
      1.0
    """
    value = check_number("constant_weighting(value)", "value", value, above=0)
    return lambda staleness: value


def polynomial_weighting(power: float = 0.5) -> Callable:
    """Returns a staleness weighting with polynomial decay.

        w(s) = (1 + s)^(−power)

    `polynomial_weighting(0)` equals `constant_weighting()`.

    Args:
      power: exponent a, at least 0.

    Returns:
      A weighting for `server_optimizer` and `delayed_nesterov`.

    Raises:
      ValueError: if the power is negative.

    Example:
      >>> polynomial_weighting(0.5)(3)
      0.5

    References:
      Xie, Koyejo, Gupta, Asynchronous Federated Optimization, 2019.
      arXiv:1903.03934
    """
    power = check_number("polynomial_weighting(power)", "power", power, at_least=0)
    return lambda staleness: (1.0 + staleness) ** -power


def server_optimizer(
    optimizer: optax.GradientTransformation, weighting: Callable | None = None
) -> Aggregation:
    """Applies an optax optimizer to the pseudo-gradient of each update.

    With the weight w of the staleness s:

        g = −w(s) pₖ / K
        z ← z + optimizer(g)

    `server_optimizer(optax.sgd(1.0))` equals `mean_update()`. An optimizer with
    momentum takes one step per update, K times as many as in the synchronous rule
    `outer`; `delayed_nesterov` compensates for that.

    Args:
      optimizer: outer optimizer; its gradient is g.
      weighting: function from the staleness to a weight; None for
        `constant_weighting()`.

    Returns:
      An aggregation whose state is the state of the optimizer.

    Raises:
      TypeError: if the optimizer is not an optax optimizer or the weighting is not
        callable.

    Example:
      >>> import optax
      >>> aggregation = server_optimizer(optax.sgd(0.7), polynomial_weighting(0.5))

    References:
      Liu et al., Asynchronous Local-SGD Training for Language Modeling, 2024.
      arXiv:2401.09135
    """
    check_optimizer("server_optimizer(optimizer)", optimizer)
    weighting = resolve_weighting("server_optimizer(weighting)", weighting)

    def apply(
        aggregate: PyTree, update: PyTree, state: PyTree, context: UpdateContext
    ) -> tuple[PyTree, PyTree]:
        gradient = pseudo_gradient(weighting, update, context.staleness)
        gradient = jax.tree.map(lambda g: g / context.num_workers, gradient)
        updates, state = optimizer.update(gradient, state, aggregate)
        return optax.apply_updates(aggregate, updates), state

    return Aggregation(optimizer.init, apply)


def pseudo_gradient(
    weighting: Callable, update: PyTree, staleness: jax.Array
) -> PyTree:
    """Returns the pseudo-gradient −w(s) pₖ in the dtypes of the update."""
    weighted = optax.tree_utils.tree_scale(-weighting(staleness), update)
    return optax.tree_utils.tree_cast_like(weighted, update)


def resolve_aggregation(call: str, aggregation: Aggregation | None) -> Aggregation:
    """Returns the aggregation, or `mean_update()` for None.

    Args:
      call: public call and argument, for messages.
      aggregation: an aggregation or None.

    Raises:
      TypeError: if it is neither.
    """
    if aggregation is None:
        return mean_update()
    if not isinstance(aggregation, Aggregation):
        raise TypeError(
            f"{call}: an Aggregation is needed, such as mean_update(); got "
            f"{describe(aggregation)}"
        )
    return aggregation


def resolve_weighting(call: str, weighting: Callable | None) -> Callable:
    """Returns the weighting, or `constant_weighting()` for None.

    Args:
      call: public call and argument, for messages.
      weighting: a function of the staleness or None.

    Raises:
      TypeError: if it is neither.
    """
    if weighting is None:
        return constant_weighting()
    check_type(call, "weighting", weighting, Callable)
    return weighting
