"""The paper's grid of step sizes, and SGD with a step size for each row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

LARGEST_RATE = 32.0


class StepSizes(NamedTuple):
    """A grid of S step sizes.

    Attributes:
      scale: c, `(S,)`.
      decays: whether it falls with t, bool `(S,)`.
    """

    scale: jax.Array
    decays: jax.Array


def step_sizes(exponents: range) -> StepSizes:
    """Makes the paper's grid: c = 2ⁱ, first the constant ones, then the decaying.

    Args:
      exponents: the i.

    Returns:
      2 · len(exponents) step sizes.

    Example:
      >>> step_sizes(range(-1, 1)).scale
      Array([0.5, 1. , 0.5, 1. ], dtype=float32)
    """
    scale = np.exp2(np.array(exponents, np.float32))
    decays = np.repeat([False, True], len(scale))
    return StepSizes(jnp.asarray(np.tile(scale, 2)), jnp.asarray(decays))


def learning_rate(sizes: StepSizes, step: jax.Array, count: int) -> jax.Array:
    """Returns the step sizes at step t.

        ηₜ = 32c   or   ηₜ = min(32, cn/(t + 1))

    Args:
      sizes: the grid.
      step: t.
      count: n.

    Returns:
      η, `(S,)`.

    Example:
      >>> learning_rate(step_sizes(range(-1, 1)), 9, count=200)
      Array([16., 32., 10., 20.], dtype=float32)
    """
    falling = jnp.minimum(LARGEST_RATE, sizes.scale * count / (step + 1.0))
    return jnp.where(sizes.decays, falling, LARGEST_RATE * sizes.scale)


def per_row_sgd(sizes: StepSizes, count: int) -> optax.GradientTransformation:
    """SGD with a step size for each row of the parameters.

        xₛ ← xₛ − ηₜ,ₛ gₛ

    Args:
      sizes: the grid, S step sizes.
      count: n.

    Returns:
      An optax optimizer for parameters `(S, d)`.
    """

    def scaled(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        rate = learning_rate(sizes, state, count)
        return -rate[:, None] * updates, state + 1

    def init(params: Any) -> Any:
        del params
        return jnp.zeros((), jnp.int32)

    return optax.GradientTransformation(init, scaled)
