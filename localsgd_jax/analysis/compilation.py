"""Compilation of programs for analysis, and the mesh of a compiled program."""

from collections.abc import Mapping
from typing import Any, cast

import jax

from localsgd_jax.analysis.device_layout import DeviceLayout, count_devices, make_layout
from localsgd_jax.analysis.hlo.parser import num_partitions
from localsgd_jax.core import validation


def compile_program(call: str, program: Any, args: tuple, kwargs: Mapping) -> Any:
    """Compiles a function without running it; returns compiled programs unchanged.

    Args:
      call: the call and argument, for the error message.
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
            f"{call}: it must be a function or a compiled program, got "
            f"{validation.describe(program)}"
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


def check_mesh(call: str, mesh: Any) -> None:
    """Raises a TypeError unless the argument is a mesh, sizes of axes, or None."""
    if mesh is None:
        return
    kinds = (jax.sharding.Mesh, jax.sharding.AbstractMesh, Mapping, DeviceLayout)
    validation.check_type(call, "mesh", mesh, *kinds)


def program_mesh(compiled: Any, mesh: Any = None, arguments: Any = ()) -> Any:
    """Returns the mesh of a program.

    Args:
      compiled: the compiled program.
      mesh: the mesh, if it is known.
      arguments: arguments of the program, with shardings.

    Returns:
      The mesh; None if there is none. Of several meshes, the largest one counts, and of
      equally large ones, one with devices.
    """
    if mesh is not None:
        return mesh
    inputs = getattr(compiled, "input_shardings", ())
    shardings = [
        getattr(leaf, "sharding", leaf) for leaf in jax.tree.leaves((inputs, arguments))
    ]
    meshes = [getattr(sharding, "mesh", None) for sharding in shardings]
    known = [mesh for mesh in meshes if mesh is not None]

    def rank(mesh: Any) -> tuple[int, bool]:
        return mesh.size, isinstance(mesh, jax.sharding.Mesh)

    return max(known, key=rank, default=None)


def check_devices(call: str, text: str, mesh: Any) -> None:
    """Raises unless a program runs on all devices of a mesh.

    On fewer devices, collectives over the mesh cannot occur, so that their absence
    says nothing.

    Args:
      call: the call and argument, for the error message.
      text: text of the compiled program.
      mesh: the mesh.

    Raises:
      ValueError: if the program runs on fewer or more devices.
    """
    layout = cast(DeviceLayout, make_layout(mesh))
    count = count_devices(layout, num_partitions(text))
    if count != layout.size:
        raise ValueError(
            f"{call}: the program must run on all {layout.size} devices of the mesh, "
            f"got {count}; give its arguments shardings on the mesh"
        )
