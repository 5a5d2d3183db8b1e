"""Arguments of optax optimizers besides gradients, state and parameters."""

import inspect
from collections.abc import Callable

import jax
import optax

from localsgd_jax.core.types import PyTree


def accepted_arguments(optimizer: optax.GradientTransformation) -> frozenset[str]:
    """Returns the extra arguments of a local step that an optimizer accepts.

    Args:
      optimizer: any optax optimizer.

    Returns:
      Names from "value", "grad", "value_fn" and "grad_fn".

    Example:
      >>> import optax
      >>> sorted(accepted_arguments(optax.with_extra_args_support(optax.sgd(0.1))))
      ['grad', 'value', 'value_fn']
    """
    parameters = inspect.signature(optimizer.update).parameters
    # Only SAM in opaque mode reads `grad_fn`, which it names.
    names = {"value", "grad", "value_fn", "grad_fn"} & parameters.keys()
    if any(x.kind == x.VAR_KEYWORD for x in parameters.values()):
        names |= {"value", "grad", "value_fn"}
    return frozenset(names)


def gradient_function(loss_fn: Callable, batch: PyTree) -> Callable:
    """Returns the gradient of a loss on a batch, as SAM in opaque mode takes it.

    Args:
      loss_fn: `loss_fn(params, batch) -> (loss, aux)`.
      batch: batch of the local step.

    Returns:
      `grad_fn(params, index) -> grad`.
    """
    return lambda params, index: jax.grad(loss_fn, has_aux=True)(params, batch)[0]


def evaluated_params(params: PyTree) -> PyTree:
    """Returns the parameters of the loss: of lookahead the fast ones.

    Args:
      params: parameters of the optimizer.

    Returns:
      `params.fast` of `optax.LookaheadParams`, else `params`.
    """
    return params.fast if isinstance(params, optax.LookaheadParams) else params
