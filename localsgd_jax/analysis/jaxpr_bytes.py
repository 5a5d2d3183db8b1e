"""Bytes that a synchronisation sends, counted on its jaxpr before compilation."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from localsgd_jax.analysis.ring_bytes import RING_BYTES_FACTOR
from localsgd_jax.core.validation import check_int, check_type

if TYPE_CHECKING:  # Imports Pallas, which takes a fifth of the import time.
    from jax.extend import core

_HLO_NAMES = {
    "psum": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "all_gather": "all-gather",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}


def jaxpr_bytes_sent(
    function: Callable, axes: Mapping[str, int], *args
) -> tuple[int, int]:
    """Returns the minimum and maximum bytes that one worker sends in a call.

    Each collective of the jaxpr counts by the ring formulas, for a group of n workers
    and an operand of b bytes:

        all-reduce 2(n − 1)/n · b,  all-gather (n − 1) · b,
        reduce-scatter and all-to-all (n − 1)/n · b,  permutation b

    Loops count with their length. If the branches of a conditional differ, the
    cheapest branch counts for the minimum and the most expensive one for the maximum.

    The result is the bytes of a worker with its own link; workers that share a device
    send less. Unlike the compiled program, whose branches all remain, the jaxpr can be
    evaluated for a given round number. With one worker per device the two counts are
    equal, which the tests verify.

    Args:
      function: the function that each worker calls.
      axes: size of each named axis.
      *args: arguments or their `jax.ShapeDtypeStruct`.

    Returns:
      The minimum and maximum bytes, rounded up; equal if nothing is conditional.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if the size of an axis is below 1.
      NotImplementedError: if a collective is in a loop without a static length.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mean = lambda x: jax.lax.pmean(x, "worker")
      >>> jaxpr_bytes_sent(mean, {"worker": 4}, jnp.zeros(1000))   # 2 · 3/4 · 4000
      (6000, 6000)
    """
    call = "jaxpr_bytes_sent"
    check_type(f"{call}(function)", "function", function, Callable)
    check_type(f"{call}(axes)", "axes", axes, Mapping)
    for name, size in axes.items():
        check_type(f"{call}(axes)", "the name of an axis", name, str)
        check_int(f"{call}(axes)", "the size of an axis", size, 1)
    traced = jax.make_jaxpr(function, axis_env=list(axes.items()))(*args)
    min_bytes, max_bytes = _jaxpr_bytes(traced.jaxpr, axes)
    return math.ceil(min_bytes), math.ceil(max_bytes)


def _jaxpr_bytes(jaxpr: "core.Jaxpr", axes: Mapping[str, int]) -> tuple[float, float]:
    """Returns the minimum and maximum bytes of all equations."""
    ranges = [_equation_bytes(equation, axes) for equation in jaxpr.eqns]
    min_bytes = sum(low for low, _ in ranges)
    return min_bytes, sum(high for _, high in ranges)


def _equation_bytes(
    equation: "core.JaxprEqn", axes: Mapping[str, int]
) -> tuple[float, float]:
    """Returns the minimum and maximum bytes of an equation and its inner jaxprs."""
    name = equation.primitive.name
    if name in _HLO_NAMES:
        factor = RING_BYTES_FACTOR[_HLO_NAMES[name]]
        bytes_sent = factor(_group_size(equation.params, axes)) * _operand_bytes(
            equation
        )
        return bytes_sent, bytes_sent
    ranges = [_jaxpr_bytes(inner, axes) for inner in inner_jaxprs(equation)]
    min_bytes = min((low for low, _ in ranges), default=0)
    max_bytes = max((high for _, high in ranges), default=0)
    if name == "while" and max_bytes:
        raise NotImplementedError(
            "jaxpr_bytes_sent(function): a collective is in a loop without a static "
            "length"
        )
    repeats = equation.params.get("length", 1) * _num_pieces(equation)
    return repeats * min_bytes, repeats * max_bytes


def inner_jaxprs(equation: "core.JaxprEqn") -> "list[core.Jaxpr]":
    """Returns the jaxprs in the parameters of an equation, such as of a loop.

    Args:
      equation: of a jaxpr.

    Returns:
      Jaxprs without constants.
    """
    params = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
    return [getattr(param, "jaxpr", param) for param in params if is_jaxpr(param)]


def _num_pieces(equation: "core.JaxprEqn") -> int:
    """Returns the number of devices of a worker that send different pieces."""
    if equation.primitive.name != "shard_map":
        return 1
    specs, mesh = equation.params["in_specs"], equation.params["mesh"]
    entries = [entry for spec in specs for entry in spec if entry is not None]
    names = {
        name
        for entry in entries
        for name in ((entry,) if isinstance(entry, str) else entry)
    }
    return math.prod(mesh.shape[name] for name in names)


def is_jaxpr(param: object) -> bool:
    """Returns whether a parameter of an equation is a jaxpr, with constants or not."""
    return hasattr(param, "eqns")


def _group_size(params: Mapping, axes: Mapping[str, int]) -> int:
    """Returns the number of workers in a collective."""
    names = params.get("axes", params.get("axis_name"))
    names = (names,) if isinstance(names, str) else names
    # Axes inside a worker do not count.
    return math.prod(axes.get(name, 1) for name in names if isinstance(name, str))


def _operand_bytes(equation: "core.JaxprEqn") -> int:
    """Returns the size of the operands in bytes."""
    operands: list[Any] = [x.aval for x in equation.invars]
    return sum(x.size * x.dtype.itemsize for x in operands)
