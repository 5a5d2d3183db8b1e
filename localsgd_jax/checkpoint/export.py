"""Export of trained parameters to programs without this library."""

import os

from localsgd_jax.checkpoint.orbax_backend import import_orbax
from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import (
    check_array_leaves,
    check_not_donated,
    check_type,
)


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
      TypeError: if the directory is no path, or a leaf no array.
      ValueError: if the directory exists, or the tree was donated.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from localsgd_jax.checkpoint import export_params
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     export_params(pathlib.Path(directory, "model"), {"w": jnp.ones(3)})
    """
    check_type("export_params(directory)", "directory", directory, str, os.PathLike)
    check_array_leaves("export_params(tree)", "tree", tree)
    check_not_donated("export_params(tree)", "tree", tree)
    with import_orbax("export_params").StandardCheckpointer() as checkpointer:
        checkpointer.save(os.path.abspath(directory), tree)
