"""Checks of the traced training step of a worker."""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import optax

from localsgd_jax.analysis.jaxpr_bytes import inner_jaxprs
from localsgd_jax.core.types import PyTree
from localsgd_jax.execution.convolutions import evaluate, has_convolution

if TYPE_CHECKING:  # Imports Pallas, which takes a fifth of the import time.
    from jax.extend import core

# Primitives with the name of an axis that send nothing.
_SENDING_NOTHING = ("axis_index", "pvary", "pcast")


def check_step(step: Callable, axes: Iterable[str], on_cpu: bool) -> Callable:
    """Adds a check for collectives over worker axes to a training step.

    On a mesh the names of the worker axes are bound while the step of a worker is
    traced. A mean over devices that was left in the step would make the workers equal
    at each step.

    Args:
      step: `step(worker, batch) -> (worker, metrics)` of one worker.
      axes: names of the worker axes on the mesh.
      on_cpu: whether the step runs on CPUs, where its convolutions are transposed.

    Returns:
      The same function. When traced, it raises a ValueError with the source line of the
      first collective over one of the axes. The step is traced once.
    """
    traced_step = jax.jit(step, inline=True)

    @functools.wraps(step)
    def checked(worker: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        traced = traced_step.trace(worker, batch)
        _forbid_collectives(traced.jaxpr.jaxpr, axes)
        if on_cpu and has_convolution(traced.jaxpr.jaxpr):
            leaves = evaluate(traced.jaxpr)(*jax.tree.leaves((worker, batch)))
            return jax.tree.unflatten(jax.tree.structure(traced.out_info), leaves)
        # This call does not trace the function again.
        return traced_step(worker, batch)

    return checked


def convolves(step: Callable, worker: PyTree, batch: PyTree) -> bool:
    """Returns whether a training step has a convolution.

    Args:
      step: `step(worker, batch) -> (worker, metrics)`.
      worker: arrays or abstract arrays.
      batch: arrays or abstract arrays.

    Returns:
      Whether the traced step has one.
    """
    return has_convolution(jax.make_jaxpr(step)(worker, batch).jaxpr)


def _forbid_collectives(jaxpr: "core.Jaxpr", axes: Iterable[str]) -> None:
    """Raises a ValueError at the first collective over the axes."""
    for name, axis, line in _collectives(jaxpr, axes):
        raise ValueError(
            "step(state, batch): a training step must not communicate between "
            f"workers, got the collective {name!r} over the worker axis {axis!r} "
            f"at {line}; remove it, or wrap the function in "
            f"bind_axis(train_step, {axis!r})"
        )


def _collectives(
    jaxpr: "core.Jaxpr", axes: Iterable[str]
) -> Iterator[tuple[str, str, str]]:
    """Yields primitive, axis and source line of each collective over the axes."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        names = equation.params.get("axes", equation.params.get("axis_name")) or ()
        names = names if isinstance(names, tuple) else (names,)
        for axis in names:
            if axis in axes and name not in _SENDING_NOTHING:
                yield name, axis, _source_line(equation)
        for inner in inner_jaxprs(equation):
            yield from _collectives(inner, axes)


def _source_line(equation: "core.JaxprEqn") -> str:
    """Returns the innermost line of an equation outside of JAX and this package."""
    traceback = equation.source_info.traceback
    for frame in getattr(traceback, "frames", ()):
        if not frame.file_name.startswith(_library_folders()):
            return f"{frame.file_name}:{frame.line_num}"
    return "an unknown line"


@functools.cache
def _library_folders() -> tuple[str, ...]:
    """Returns the folders of JAX, optax and this package."""
    files = (jax.__file__, optax.__file__, str(Path(__file__).parent))
    return tuple(f"{Path(str(file)).parent}/" for file in files)
