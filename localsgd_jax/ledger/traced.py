"""What a synchronisation will send, from the traced program before it is compiled."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:  # At run time it would import Pallas: a fifth of the import time.
    from jax.extend import core

# Bytes that one of n members of a group sends, per byte of its operand, by the ring
# algorithms: reduce-scatter and all-gather are each half an all-reduce.
_RING = {
    "psum": lambda n: 2 * (n - 1) / n,
    "pmax": lambda n: 2 * (n - 1) / n,
    "pmin": lambda n: 2 * (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: n - 1,
    "all_to_all": lambda n: (n - 1) / n,
    "ppermute": lambda n: 1,
}


def sent_bytes(function: Callable, axes: Mapping[str, int], *args) -> tuple[int, int]:
    """Counts the bytes that one worker sends when all of them call a function.

    Every collective of the traced program counts by the ring formulas, for a group
    of n workers and an operand of b bytes:

        all-reduce 2(n − 1)/n · b,  all-gather (n − 1) · b,
        reduce-scatter and all-to-all (n − 1)/n · b,  permutation b

    A loop counts as often as it runs. Branches of a conditional may differ: the
    cheapest and the dearest give the least and the most.

    This is what a worker with a link of its own sends; workers that share a device
    really send less. It is known before anything is compiled, for a given round, of
    which a compiled program only says that one branch or the other runs; with a device
    for each worker both agree, which the tests hold to.

    Args:
      function: what one worker calls.
      axes: size of each named axis.
      *args: arguments or their `jax.ShapeDtypeStruct`.

    Returns:
      The least and the most bytes, rounded up; equal if nothing is conditional.

    Raises:
      NotImplementedError: if a collective stands in a loop of unknown length.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mean = lambda x: jax.lax.pmean(x, "worker")
      >>> sent_bytes(mean, {"worker": 4}, jnp.zeros(1000))   # 2 · 3/4 · 4000
      (6000, 6000)
    """
    traced = jax.make_jaxpr(function, axis_env=list(axes.items()))(*args)
    least, most = _count(traced.jaxpr, axes)
    return math.ceil(least), math.ceil(most)


def _count(jaxpr: "core.Jaxpr", axes: Mapping[str, int]) -> tuple[float, float]:
    """Adds up the least and the most bytes of all equations."""
    counts = [_count_one(equation, axes) for equation in jaxpr.eqns]
    return sum(least for least, _ in counts), sum(most for _, most in counts)


def _count_one(
    equation: "core.JaxprEqn", axes: Mapping[str, int]
) -> tuple[float, float]:
    """Counts an equation: a collective, or one that holds programs of its own."""
    name = equation.primitive.name
    if name in _RING:
        sent = _RING[name](_group(equation.params, axes)) * _operand_bytes(equation)
        return sent, sent
    parts = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program)
    inner = [
        _count(getattr(part, "jaxpr", part), axes)
        for part in parts
        if _is_program(part)
    ]
    most = max((most for _, most in inner), default=0)
    if name == "while" and most:
        raise NotImplementedError(
            "sent_bytes(function): a collective stands in a loop whose length the "
            "program does not say"
        )
    times = equation.params.get("length", 1)
    return times * min((least for least, _ in inner), default=0), times * most


def _is_program(part: object) -> bool:
    """Returns whether a parameter of an equation is a program itself."""
    return hasattr(part, "eqns")


def _group(params: Mapping, axes: Mapping[str, int]) -> int:
    """Returns how many workers take part in a collective."""
    names = params.get("axes", params.get("axis_name"))
    names = (names,) if isinstance(names, str) else names
    return math.prod(axes[name] for name in names if isinstance(name, str))


def _operand_bytes(equation: "core.JaxprEqn") -> int:
    """Returns the bytes that go into a collective."""
    operands: list[Any] = [x.aval for x in equation.invars]
    return sum(x.size * x.dtype.itemsize for x in operands)
