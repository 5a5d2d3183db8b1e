"""Storage of checkpoints by Orbax: options, reads, writes and errors."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np


class CheckpointError(ValueError):
    """A checkpoint does not match the run, is damaged, or could not be written."""


class CheckpointStorage:
    """The checkpoints in a directory, each a list of arrays and JSON metadata."""

    def __init__(
        self, directory: str | os.PathLike, max_to_keep: int, process_local: bool
    ) -> None:
        """Opens a directory; creates it if it does not exist.

        Args:
          directory: directory of the checkpoints.
          max_to_keep: number of checkpoints that are kept.
          process_local: whether each process reads, and process 0 writes, without
            barriers between processes.

        Raises:
          ImportError: if orbax-checkpoint is not installed.
        """
        self._orbax = import_orbax("RunCheckpointer")
        self._process_local = process_local
        self.directory = os.path.abspath(directory)
        if process_local:
            os.makedirs(self.directory, exist_ok=True)
            options = _process_local_options(self._orbax, max_to_keep)
        else:
            options = _global_options(self._orbax, max_to_keep)
        self._manager = self._orbax.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Returns the step of the latest complete checkpoint, or None."""
        return self._manager.latest_step()

    def write(self, step: int, leaves: Sequence[jax.Array], metadata: dict) -> None:
        """Starts to write a checkpoint; returns when the arrays are copied.

        Args:
          step: number of the checkpoint.
          leaves: arrays without typed PRNG keys.
          metadata: JSON-compatible data.

        Raises:
          CheckpointError: if this checkpoint or the one before could not be written.
        """
        # A process-local checkpoint of several processes must be in host memory, since
        # Orbax writes a device array with all processes.
        arrays = [np.asarray(x) for x in leaves] if self._process_local else [*leaves]
        args = self._orbax.args
        items = args.Composite(
            state=args.StandardSave(arrays), metadata=args.JsonSave(metadata)
        )
        with self._convert_write_errors("save(state)"):
            self._manager.save(step, args=items)

    def read_metadata(self, step: int) -> dict:
        """Reads the metadata of a checkpoint; raises CheckpointError if damaged."""
        return self._read(step, "metadata", self._orbax.args.JsonRestore())

    def read_leaves(self, step: int, targets: Sequence[Any]) -> list[Any]:
        """Reads the arrays of a checkpoint.

        Args:
          step: number of the checkpoint.
          targets: for each array a `jax.ShapeDtypeStruct` with sharding, or a NumPy
            array for a result in host memory.

        Returns:
          The arrays.

        Raises:
          CheckpointError: if the checkpoint is damaged.
        """
        item = self._orbax.args.StandardRestore([*targets])
        return self._read(step, "state", item)

    def close(self) -> None:
        """Waits until all checkpoints are written; raises CheckpointError otherwise."""
        with self._convert_write_errors("close()"):
            self._manager.close()

    def _read(self, step: int, name: str, item: object) -> Any:
        """Reads an item of a checkpoint."""
        try:
            items = self._orbax.args.Composite(**{name: item})
            return self._manager.restore(step, args=items)[name]
        except Exception as error:  # Orbax and its backends raise many types.
            raise CheckpointError(
                f"restore(state): checkpoint {step} in {self.directory} is damaged "
                f"({_first_line(error)}); remove it to restore the previous checkpoint"
            ) from error

    @contextlib.contextmanager
    def _convert_write_errors(self, call: str) -> Iterator[None]:
        """Converts errors of a write to a CheckpointError of one line."""
        try:
            yield
        except Exception as error:  # Orbax and its backends raise many types.
            raise CheckpointError(
                f"{call}: a checkpoint could not be written into {self.directory} "
                f"({_root_cause(error)}); complete checkpoints are not affected"
            ) from error


def import_orbax(call: str) -> ModuleType:
    """Imports orbax.checkpoint or raises an ImportError with the install command."""
    try:
        import orbax.checkpoint
    except ImportError:
        raise ImportError(
            f"{call}() needs orbax-checkpoint: pip install orbax-checkpoint"
        ) from None
    return orbax.checkpoint


def _global_options(orbax: ModuleType, max_to_keep: int) -> Any:
    """Returns the manager options of a job in which all processes write."""
    return orbax.CheckpointManagerOptions(
        max_to_keep=max_to_keep, cleanup_tmp_directories=True
    )


def _process_local_options(orbax: ModuleType, max_to_keep: int) -> Any:
    """Returns the manager options of a process that reads or writes without barriers.

    Process 0 writes. The others only read, and remove no temporary directories.
    """
    process = jax.process_index()
    multiprocessing = orbax.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process{process}",
    )
    if process:
        return orbax.CheckpointManagerOptions(
            read_only=True, create=False, multiprocessing_options=multiprocessing
        )
    return orbax.CheckpointManagerOptions(
        max_to_keep=max_to_keep,
        cleanup_tmp_directories=True,
        create=False,
        multiprocessing_options=multiprocessing,
    )


def _root_cause(error: Exception) -> str:
    """Returns the message of the operating system, or the first line of the error."""
    code = getattr(error, "errno", None) or re.search(
        r"os_error_code='(\d+)'", str(error)
    )
    if code is None:
        return _first_line(error)
    return os.strerror(code if isinstance(code, int) else int(code[1]))


def _first_line(error: Exception) -> str:
    """Returns the type and the first line of an error, at most 200 characters."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
