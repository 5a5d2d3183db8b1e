"""Convolutions of training steps on CPUs.

XLA computes a convolution on CPUs by a library if its operands have the layouts `N...C`
and `...IO`. It transposes others into these layouts outside of loops only. Inside, such
as in a scan of local steps, the gradients of a convolution are computed 10 to 100 times
slower. Here the transposes are part of the step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from localsgd_jax.analysis.jaxpr_bytes import inner_jaxprs, is_jaxpr

if TYPE_CHECKING:  # Imports Pallas, which takes a fifth of the import time.
    from jax.extend import core

_CONVOLUTION = "conv_general_dilated"


def has_convolution(jaxpr: "core.Jaxpr") -> bool:
    """Returns whether a jaxpr, or one inside it, has a convolution.

    Args:
      jaxpr: a jaxpr without constants.

    Returns:
      Whether there is one.
    """
    return any(
        equation.primitive.name == _CONVOLUTION
        or any(map(has_convolution, inner_jaxprs(equation)))
        for equation in jaxpr.eqns
    )


def transpose_convolutions(jaxpr: "core.Jaxpr") -> "core.Jaxpr":
    """Transposes the operands of convolutions into the layouts of XLA's CPU library.

    Args:
      jaxpr: a jaxpr without constants.

    Returns:
      A jaxpr of the same function.
    """
    return jaxpr.replace(eqns=[_transpose_equation(x) for x in jaxpr.eqns])


def is_cpu(mesh: jax.sharding.Mesh | None) -> bool:
    """Returns whether the devices of a mesh, or the default device, are CPUs."""
    if mesh is not None:
        return mesh.devices.flat[0].platform == "cpu"
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if default is None:
        return jax.default_backend() == "cpu"
    return getattr(default, "platform", default) == "cpu"


def _transpose_equation(equation: "core.JaxprEqn") -> "core.JaxprEqn":
    """Returns an equation with its convolutions in the layouts of the library."""
    if equation.primitive.name == _CONVOLUTION:
        convolve = jax.jit(partial(_convolve, equation.primitive, **equation.params))
        operands = [x.aval for x in equation.invars]
        (call,) = jax.make_jaxpr(convolve)(*operands).eqns
        return call.replace(invars=equation.invars, outvars=equation.outvars)
    if not any(map(has_convolution, inner_jaxprs(equation))):
        return equation
    params = jax.tree.map(_transpose_inner, equation.params, is_leaf=is_jaxpr)
    return equation.replace(params=params)


def _transpose_inner(param: Any) -> Any:
    """Applies `transpose_convolutions` to a parameter that is a jaxpr."""
    if not is_jaxpr(param):
        return param
    if hasattr(param, "consts"):
        return param.replace(jaxpr=transpose_convolutions(param.jaxpr))
    return transpose_convolutions(param)


def _convolve(
    primitive: "core.Primitive",
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    dimension_numbers: jax.lax.ConvDimensionNumbers,
    **params: Any,
) -> jax.Array:
    """Convolves `N...C` with `...IO`, with transposes before and after."""
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    lhs = jax.lax.transpose(lhs, _channels_last(lhs_spec))
    rhs = jax.lax.transpose(rhs, (*rhs_spec[2:], rhs_spec[1], rhs_spec[0]))
    rank = lhs.ndim
    image = (0, rank - 1, *range(1, rank - 1))
    kernel = (rank - 1, rank - 2, *range(rank - 2))
    layouts = jax.lax.ConvDimensionNumbers(image, kernel, image)
    out = primitive.bind(lhs, rhs, dimension_numbers=layouts, **params)
    positions = _channels_last(out_spec)
    inverse = sorted(range(rank), key=positions.__getitem__)
    return jax.lax.transpose(out, inverse)


def _channels_last(spec: Sequence[int]) -> tuple[int, ...]:
    """Returns the axes of an image in the order batch, space, channels."""
    return (spec[0], *spec[2:], spec[1])


def evaluate(jaxpr: "core.ClosedJaxpr") -> Callable:
    """Returns the function of a jaxpr, with transposed convolutions.

    Args:
      jaxpr: a jaxpr with constants.

    Returns:
      A function of flat arguments, which returns a list.
    """
    from jax.extend.core import jaxpr_as_fun

    return jaxpr_as_fun(jaxpr.replace(jaxpr=transpose_convolutions(jaxpr.jaxpr)))
