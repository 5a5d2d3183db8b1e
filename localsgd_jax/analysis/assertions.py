"""Assertion that a compiled step contains no collectives along given mesh axes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from localsgd_jax.analysis import compilation
from localsgd_jax.analysis.collective_op import CollectiveOp, filter_by_axis
from localsgd_jax.analysis.ops import parse_collective_ops
from localsgd_jax.analysis.table import format_table
from localsgd_jax.core.validation import check_names


class UnexpectedCollectiveError(AssertionError):
    """A step contains collectives along a mesh axis where none are allowed.

    Attributes:
      collectives: these collectives.
    """

    def __init__(self, message: str, collectives: tuple[CollectiveOp, ...]) -> None:
        """Stores the collectives."""
        super().__init__(message)
        self.collectives = collectives


def assert_no_collectives(
    step: Callable,
    *args: Any,
    axis: str | Sequence[str] = "worker",
    mesh: Any = None,
    **kwargs: Any,
) -> tuple[CollectiveOp, ...]:
    """Asserts that a compiled step contains no collectives along a mesh axis.

    The step is compiled, not run. Collectives along other axes are allowed: a worker
    that is itself sharded needs them. An instruction that may leave the device and that
    the analysis does not understand, such as a host callback or an unknown custom call,
    counts for every axis.

    Args:
      step: a function, jitted or not, or a compiled program.
      *args, **kwargs: its arguments or their `jax.ShapeDtypeStruct`, with shardings.
      axis: the mesh axis, or several.
      mesh: the mesh; None for the mesh of the arguments.

    Returns:
      The collectives along other axes.

    Raises:
      TypeError: if an argument has the wrong type.
      UnexpectedCollectiveError: an AssertionError with a table of the collectives and
        their source locations.
      ValueError: if no mesh is known or it has no such axis, or if the check would be
        vacuous: the axis has size 1, or the program does not run on the whole mesh.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((jax.device_count(),), ("worker",))
      >>> sharding = NamedSharding(mesh, PartitionSpec("worker"))
      >>> losses = jax.device_put(jnp.zeros(jax.device_count()), sharding)
      >>> assert_no_collectives(lambda x: 2 * x, losses)
      ()
      >>> try:
      ...     assert_no_collectives(jnp.mean, losses)
      ... except UnexpectedCollectiveError as error:
      ...     error.collectives[0].name, error.collectives[0].axes
      ('all-reduce', ('worker',))
    """
    call = "assert_no_collectives"
    names = check_names(f"{call}(axis)", "axis", axis)
    compilation.check_mesh(f"{call}(mesh)", mesh)
    compiled = compilation.compile_program(f"{call}(step)", step, args, kwargs)
    mesh = compilation.program_mesh(compiled, mesh, (args, kwargs))
    _check_axis_sizes(names, None if mesh is None else mesh.shape)
    text = compiled.as_text()
    compilation.check_devices(f"{call}(step)", text, mesh)
    ops = parse_collective_ops(text, mesh)
    violations = filter_by_axis(ops, names)
    if violations:
        raise UnexpectedCollectiveError(
            "assert_no_collectives(step): step must contain no collectives along "
            f"{' and '.join(names)}, got {len(violations)}\n\n"
            + format_table(violations),
            violations,
        )
    return ops


def _check_axis_sizes(names: Sequence[str], sizes: Mapping[str, int] | None) -> None:
    """Raises if the program has no mesh, or if an axis is missing or of size 1."""
    if sizes is None:
        raise ValueError(
            "assert_no_collectives(step): the arguments are not on a mesh; pass "
            "mesh=..., or arguments with shardings"
        )
    for name in names:
        if name not in sizes:
            raise ValueError(
                f"assert_no_collectives(axis): the mesh has the axes {tuple(sizes)}, "
                f"got {name!r}"
            )
        if sizes[name] < 2:
            raise ValueError(
                f"assert_no_collectives(axis): the mesh axis {name!r} has size 1, so "
                "the check is vacuous; use at least 2 devices (on a CPU, start with "
                "JAX_NUM_CPU_DEVICES=8)"
            )
