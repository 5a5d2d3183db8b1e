"""Compiled programs and the mesh that they run on."""

from collections.abc import Mapping
from typing import Any

import jax


def compiled(program: Any, args: tuple, kwargs: Mapping) -> Any:
    """Compiles a function without running it; a compiled program stays as it is.

    Args:
      program: a function, jitted or not, or a compiled program.
      args, kwargs: arguments of the function or their shapes.

    Returns:
      The compiled program.

    Raises:
      TypeError: if `program` is neither.
    """
    if hasattr(program, "as_text") and not callable(getattr(program, "lower", None)):
        return program
    if not callable(program):
        raise TypeError(
            f"ledger(program): a compiled program or a function is needed, got "
            f"{program!r}"
        )
    name = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, name)
    # A program kept on disk would bring the line numbers of the day it was compiled.
    jax.config.update(name, True)
    try:
        jitted = program if hasattr(program, "lower") else jax.jit(program)
        return jitted.lower(*args, **kwargs).compile()
    finally:
        jax.config.update(name, before)


def axis_sizes(
    compiled: Any, mesh: Any = None, arguments: Any = ()
) -> Mapping[str, int] | None:
    """Finds the mesh of a program.

    Args:
      compiled: the program.
      mesh: the mesh, if it is known.
      arguments: with shardings.

    Returns:
      The sizes of its axes, outermost first; None if there is no mesh.
    """
    if mesh is not None:
        return dict(mesh.shape)
    inputs = getattr(compiled, "input_shardings", ())
    placed = [getattr(x, "sharding", x) for x in jax.tree.leaves((inputs, arguments))]
    meshes = [getattr(sharding, "mesh", None) for sharding in placed]
    known = [mesh for mesh in meshes if mesh is not None]
    return dict(max(known, key=lambda mesh: mesh.size).shape) if known else None
