"""Compilation of programs for analysis, and the mesh of a compiled program."""

from collections.abc import Mapping
from typing import Any

import jax


def compile_program(program: Any, args: tuple, kwargs: Mapping) -> Any:
    """Compiles a function without running it; returns compiled programs unchanged.

    Args:
      program: a function, jitted or not, or a compiled program.
      args, kwargs: arguments of the function, or their `jax.ShapeDtypeStruct`.

    Returns:
      The compiled program.

    Raises:
      TypeError: if `program` is neither.
    """
    if hasattr(program, "as_text") and not callable(getattr(program, "lower", None)):
        return program
    if not callable(program):
        raise TypeError(
            "collective_ops(program): program must be a function or a compiled "
            f"program, got {program!r}"
        )
    option = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, option)
    # Without the metadata in the key, the persistent cache could return an executable
    # with source locations of an earlier version of the code.
    jax.config.update(option, True)
    try:
        jitted = program if hasattr(program, "lower") else jax.jit(program)
        return jitted.lower(*args, **kwargs).compile()
    finally:
        jax.config.update(option, before)


def axis_sizes(
    compiled: Any, mesh: Any = None, arguments: Any = ()
) -> Mapping[str, int] | None:
    """Returns the axis sizes of the mesh of a program.

    Args:
      compiled: the compiled program.
      mesh: the mesh, if it is known.
      arguments: arguments of the program, with shardings.

    Returns:
      Sizes of the mesh axes, outermost first; None if there is no mesh. Of several
      meshes, the largest one counts.
    """
    if mesh is not None:
        return dict(mesh.shape)
    inputs = getattr(compiled, "input_shardings", ())
    shardings = [
        getattr(leaf, "sharding", leaf) for leaf in jax.tree.leaves((inputs, arguments))
    ]
    meshes = [getattr(sharding, "mesh", None) for sharding in shardings]
    known = [mesh for mesh in meshes if mesh is not None]
    return dict(max(known, key=lambda mesh: mesh.size).shape) if known else None
