"""Export of trained parameters to programs without this library."""

import os

from localsgd_jax.checkpoint.orbax_backend import import_orbax
from localsgd_jax.core.types import PyTree


def export_params(directory: str | os.PathLike, tree: PyTree) -> None:
    """Writes a pytree as a plain Orbax checkpoint.

    Orbax and every reader of Flax checkpoints can read it:

        orbax.checkpoint.StandardCheckpointer().restore(directory)

    Args:
      directory: path to write; must not exist.
      tree: such as `consensus(state)`, or `consensus(state, ("params",
        "batch_stats"))` for the variables of a linen model.

    Raises:
      ImportError: if orbax-checkpoint is not installed.
      ValueError: if the directory exists.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from localsgd_jax.checkpoint import export_params
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     export_params(pathlib.Path(directory, "model"), {"w": jnp.ones(3)})
    """
    with import_orbax("export_params").StandardCheckpointer() as checkpointer:
        checkpointer.save(os.path.abspath(directory), tree)
