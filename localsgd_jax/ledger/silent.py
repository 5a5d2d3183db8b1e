"""The proof that a step does not talk, from its compiled program."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from localsgd_jax.ledger import programs
from localsgd_jax.ledger.entries import Entry, along, read
from localsgd_jax.ledger.table import table


class NoisyStepError(AssertionError):
    """A step that should be silent talks.

    Attributes:
      entries: the collectives.
    """

    def __init__(self, message: str, entries: tuple) -> None:
        """Keeps the collectives."""
        super().__init__(message)
        self.entries = entries


def assert_silent(
    step: Callable,
    *args: Any,
    axis: str | Sequence[str] = "worker",
    mesh: Any = None,
    **kwargs: Any,
) -> tuple[Entry, ...]:
    """Proves from the compiled program that a step sends nothing along an axis.

    The step is compiled, not run. Collectives along other axes are allowed: a worker
    that is itself sharded needs them.

    Args:
      step: a function, jitted or not, or a compiled program.
      *args, **kwargs: its arguments or their `jax.ShapeDtypeStruct`, with shardings.
      axis: mesh axis along which it must be silent, or several.
      mesh: the mesh; None for the one of the arguments.

    Returns:
      The collectives along other axes.

    Raises:
      NoisyStepError: an AssertionError with a table of the collectives, each with the
        line of source that it comes from.
      ValueError: if there is no mesh with that axis, or a single place along it, so
        that silence would prove nothing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((jax.device_count(),), ("worker",))
      >>> split = NamedSharding(mesh, PartitionSpec("worker"))
      >>> losses = jax.device_put(jnp.zeros(jax.device_count()), split)
      >>> assert_silent(lambda x: 2 * x, losses)
      ()
      >>> try:
      ...     assert_silent(jnp.mean, losses)
      ... except NoisyStepError as error:
      ...     error.entries[0].name, error.entries[0].axes
      ('all-reduce', ('worker',))
    """
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    compiled = programs.compiled(step, args, kwargs)
    sizes = programs.axis_sizes(compiled, mesh, (args, kwargs))
    _check_places(names, sizes)
    found = read(compiled.as_text(), sizes)
    talking = along(found, names)
    if talking:
        raise NoisyStepError(
            f"assert_silent(step): it talks along {' and '.join(names)}\n\n"
            + table(talking),
            talking,
        )
    return found


def _check_places(names: Sequence[str], sizes: Mapping[str, int] | None) -> None:
    """Refuses a proof in which nobody could talk."""
    if sizes is None:
        raise ValueError(
            "assert_silent(step): the arguments lie on no mesh; give mesh=..., or "
            "arguments with shardings"
        )
    for name in names:
        if name not in sizes:
            raise ValueError(
                f"assert_silent(axis): the mesh has the axes {tuple(sizes)}, and no "
                f"{name!r}"
            )
        if sizes[name] < 2:
            raise ValueError(
                f"assert_silent(axis): the mesh axis {name!r} has a single place, "
                "where silence proves nothing"
            )
