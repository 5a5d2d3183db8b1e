"""Import and options of Orbax."""

from types import ModuleType
from typing import Any

import jax


def import_orbax(call: str) -> ModuleType:
    """Imports orbax.checkpoint or raises an ImportError with the install command."""
    try:
        import orbax.checkpoint
    except ImportError:
        raise ImportError(
            f"{call}() needs orbax-checkpoint: pip install orbax-checkpoint"
        ) from None
    return orbax.checkpoint


def writer_options(orbax: ModuleType, max_to_keep: int, process_local: bool) -> Any:
    """Returns the options of a checkpoint manager that writes.

    Args:
      orbax: the module.
      max_to_keep: number of checkpoints that are kept.
      process_local: whether process 0 writes without barriers between processes. The
        manager of other processes is not used.

    Returns:
      `CheckpointManagerOptions`.
    """
    if not process_local:
        return orbax.CheckpointManagerOptions(
            max_to_keep=max_to_keep, cleanup_tmp_directories=True
        )
    process = jax.process_index()
    multiprocessing = orbax.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process{process}",
    )
    return orbax.CheckpointManagerOptions(
        max_to_keep=max_to_keep,
        cleanup_tmp_directories=True,
        create=False,
        multiprocessing_options=multiprocessing,
    )
