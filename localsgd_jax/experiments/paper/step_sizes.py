"""Step-size grid of the paper, and row-wise SGD."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

MAX_RATE = 32.0


class StepSizes(NamedTuple):
    """A grid of S step sizes.

    Attributes:
      scale: c, `(S,)`.
      decays: whether the step size decreases with t, bool `(S,)`.
    """

    scale: jax.Array
    decays: jax.Array


def step_sizes(exponents: range) -> StepSizes:
    """Returns the grid c = 2ⁱ, first constant, then decreasing step sizes.

    Args:
      exponents: all i.

    Returns:
      2 · len(exponents) step sizes.

    Example:
      >>> step_sizes(range(-1, 1)).scale
      Array([0.5, 1. , 0.5, 1. ], dtype=float32)
    """
    scale = np.exp2(np.array(exponents, np.float32))
    decays = np.repeat([False, True], len(scale))
    return StepSizes(jnp.asarray(np.tile(scale, 2)), jnp.asarray(decays))


def constant_step_sizes(exponents: range) -> StepSizes:
    """Returns only the constant step sizes of the grid.

    Args:
      exponents: all i.

    Returns:
      len(exponents) step sizes.

    Example:
      >>> constant_step_sizes(range(-1, 1)).decays
      Array([False, False], dtype=bool)
    """
    return jax.tree.map(lambda x: x[: len(exponents)], step_sizes(exponents))


def learning_rate(sizes: StepSizes, step: jax.Array | int, examples: int) -> jax.Array:
    """Returns the step sizes at step t.

        ηₜ = 32c   or   ηₜ = min(32, cn/(t + 1))

    Args:
      sizes: the grid.
      step: t.
      examples: n.

    Returns:
      η, `(S,)`.

    Example:
      >>> learning_rate(step_sizes(range(-1, 1)), 9, examples=200)
      Array([16., 32., 10., 20.], dtype=float32)
    """
    decreasing = jnp.minimum(MAX_RATE, sizes.scale * examples / (step + 1.0))
    return jnp.where(sizes.decays, decreasing, MAX_RATE * sizes.scale)


def per_row_sgd(sizes: StepSizes, examples: int) -> optax.GradientTransformation:
    """Creates SGD with one step size per row of the parameters.

        xₛ ← xₛ − ηₜ,ₛ gₛ

    Args:
      sizes: the grid, S step sizes.
      examples: n.

    Returns:
      An optax optimizer for parameters `(S, d)`.
    """

    def init(params: Any) -> Any:
        del params
        return jnp.zeros((), jnp.int32)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        rate = learning_rate(sizes, state, examples)
        return -rate[:, None] * updates, state + 1

    return optax.GradientTransformation(init, update)
