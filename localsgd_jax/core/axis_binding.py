"""Adapter for training steps that were written for `jax.pmap`."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check_type


def bind_axis(train_step: Callable, axis_name: str) -> Callable:
    """Binds the axis name of a training step to a single worker.

    A mean over an axis of size 1 is the identity, so that the collectives of a step for
    `jax.pmap` disappear and the step runs unchanged as the step of one worker:

        pmean(x, axis_name) = x

    Args:
      train_step: a pure function of pytrees with collectives over `axis_name`, such as
        `jax.lax.pmean(grads, "batch")` or `BatchNorm(axis_name="batch")`; also the
        result of `jax.pmap`, whose function is used without `pmap`.
      axis_name: the name of the axis.

    Returns:
      A function of the same arguments, for `from_train_step` and `from_linen`.

    Raises:
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import localsgd_jax as lsgd
      >>> def train_step(state, batch):
      ...     grad = jax.lax.pmean(state["params"] - batch, "batch")
      ...     return {"params": state["params"] - 0.5 * grad}, {}
      >>> algorithm = lsgd.from_train_step(
      ...     lsgd.bind_axis(train_step, "batch"), rule=lsgd.average())
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> state, _ = cluster.step(
      ...     cluster.init({"params": jnp.zeros(())}), jnp.array([1.0, 3.0]))
      >>> state.workers["params"]
      Array([0.5, 1.5], dtype=float32)
    """
    check_type("bind_axis(train_step)", "train_step", train_step, Callable)
    check_type("bind_axis(axis_name)", "axis_name", axis_name, str)
    function = _without_pmap(train_step)

    @functools.wraps(function)
    def bound(*args: Any, **kwargs: Any) -> PyTree:
        # Nothing is mapped, so that no array gets a batch axis inside.
        mapped = jax.vmap(
            lambda _: function(*args, **kwargs),
            in_axes=None,
            axis_name=axis_name,
            axis_size=1,
        )
        return jax.tree.map(lambda x: x[0], mapped(None))

    return bound


def _without_pmap(function: Callable) -> Callable:
    """Returns the function inside `jax.pmap`, or the given one."""
    # Functions of jax.pmap have `lower` and no `trace`; those of jax.jit have both.
    is_pmapped = hasattr(function, "lower") and not hasattr(function, "trace")
    return getattr(function, "__wrapped__", function) if is_pmapped else function
