"""Directory of checkpoints: lock, writes by Orbax, and the list of steps."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from localsgd_jax.checkpoint.errors import CheckpointError, first_line
from localsgd_jax.checkpoint.lock import DirectoryLock
from localsgd_jax.checkpoint.orbax_backend import import_orbax, writer_options
from localsgd_jax.distributed.coordination import broadcast_from_first


class CheckpointStorage:
    """The checkpoints in a directory, each a list of arrays and JSON metadata.

    Attributes:
      directory: absolute path.
      processes: indices of the processes that make the same calls.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        max_to_keep: int,
        process_local: bool,
        read_only: bool,
    ) -> None:
        """Opens a directory; creates and locks it unless it is read only.

        Args:
          directory: directory of the checkpoints.
          max_to_keep: number of checkpoints that are kept.
          process_local: whether each process reads, and process 0 writes, without
            barriers between processes.
          read_only: whether nothing is written.

        Raises:
          ImportError: if orbax-checkpoint is not installed.
          CheckpointError: if the directory cannot be created, written or read, or is in
            use by another process.
        """
        self._orbax = import_orbax("RunCheckpointer")
        self._process_local, self._is_closed = process_local, False
        self._lock: DirectoryLock | None = None
        self._manager: Any = None
        self.directory = os.path.abspath(directory)
        first = jax.process_index()
        self.processes = [first] if process_local else [*range(jax.process_count())]
        self._is_writer = not read_only and (not process_local or first == 0)
        if read_only and not os.path.isdir(self.directory):
            raise CheckpointError(
                "RunCheckpointer(directory, read_only=True): directory must exist, got "
                f"{self.directory}"
            )
        if self._is_writer:
            self._in_first_process("RunCheckpointer()", self._open)
            options = writer_options(self._orbax, max_to_keep, process_local)
            self._manager = self._orbax.CheckpointManager(
                self.directory, options=options
            )

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, ascending.

        Waits for a write in the background.

        Raises:
          CheckpointError: if it has failed.
        """
        if self._manager is not None and not self._is_closed:
            with self._convert_write_errors("restore(state)"):
                self._manager.wait_until_finished()

        def read() -> list[int]:
            with contextlib.suppress(FileNotFoundError):
                return sorted(
                    int(entry.name)
                    for entry in os.scandir(self.directory)
                    if re.fullmatch("0|[1-9][0-9]*", entry.name) and entry.is_dir()
                )
            return []

        return self._in_first_process("RunCheckpointer.steps()", read)

    def check_writable(self, call: str) -> None:
        """Raises CheckpointError if this object may not write any more.

        Args:
          call: public call for the message.
        """
        if self._is_closed:
            raise CheckpointError(f"{call}: the checkpointer is closed")
        if not self._is_writer:
            raise CheckpointError(
                f"{call}: the checkpointer is read only in this process; with "
                "process_local=True only process 0 saves"
            )
        lock_problem = self._in_first_process(f"RunCheckpointer.{call}", self._problem)
        if lock_problem:
            raise CheckpointError(f"{call}: {lock_problem}")

    def latest_step(self) -> int | None:
        """Returns the step of the latest checkpoint that is complete or being written.

        Only a process that writes may call it.
        """
        return self._manager.latest_step()

    def write(
        self,
        step: int,
        leaves: Sequence[jax.Array],
        metadata: dict,
        data: dict | None = None,
    ) -> None:
        """Starts to write a checkpoint; returns when the arrays are copied.

        Args:
          step: number of the checkpoint.
          leaves: arrays without typed PRNG keys.
          metadata: JSON-compatible data.
          data: JSON-compatible states of the iterators; None for no such item.

        Raises:
          CheckpointError: if this checkpoint or the one before could not be written.
        """
        # A process-local checkpoint of several processes must be in host memory, since
        # Orbax writes a device array with all processes.
        arrays = [np.asarray(x) for x in leaves] if self._process_local else [*leaves]
        args = self._orbax.args
        items = {
            "state": args.StandardSave(arrays),
            "metadata": args.JsonSave(metadata),
        }
        if data is not None:
            items["data"] = args.JsonSave(data)
        with self._convert_write_errors("save(state)"):
            self._manager.save(step, args=args.Composite(**items))

    def set_aside(self, steps: Sequence[int]) -> None:
        """Renames checkpoints from `N` to `N.damaged`; no effect without writing.

        Args:
          steps: numbers of the checkpoints.
        """
        if not self._is_writer or not steps:
            return

        def rename() -> None:
            for step in steps:
                path = os.path.join(self.directory, str(step))
                os.rename(path, _unused_name(f"{path}.damaged"))

        self._in_first_process("RunCheckpointer.restore()", rename)
        self._manager.reload()

    def close(self) -> None:
        """Waits until all checkpoints are written; raises CheckpointError otherwise."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if self._manager is not None:
                with self._convert_write_errors("close()"):
                    self._manager.close()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _open(self) -> None:
        """Creates and locks the directory."""
        try:
            os.makedirs(self.directory, exist_ok=True)
            self._lock = DirectoryLock(self.directory)
        except OSError as error:
            raise CheckpointError(
                f"RunCheckpointer(directory): {self.directory} cannot be created or "
                f"written ({os.strerror(error.errno or 0)})"
            ) from error

    def _problem(self) -> str | None:
        """Returns why this process may not write any more, or None."""
        return None if self._lock is None else self._lock.problem()

    def _in_first_process(self, call: str, compute: Callable[[], Any]) -> Any:
        """Calls a function in process 0; all processes return its result.

        A CheckpointError is raised in all processes.
        """

        def attempt() -> dict:
            try:
                return {"value": compute()}
            except CheckpointError as error:
                return {"error": str(error)}

        result: Any = broadcast_from_first(call, attempt, self.processes)
        if "error" in result:
            raise CheckpointError(result["error"])
        return result["value"]

    @contextlib.contextmanager
    def _convert_write_errors(self, call: str) -> Iterator[None]:
        """Converts errors of a write to a CheckpointError of one line."""
        try:
            yield
        except Exception as error:  # Orbax and its backends raise many types.
            problem = self._problem()
            raise CheckpointError(
                f"{call}: a checkpoint could not be written into {self.directory} "
                f"({_root_cause(error)}); "
                + (problem or "complete checkpoints are not affected")
            ) from error


def _unused_name(path: str) -> str:
    """Returns a path, with a number appended if it exists."""
    name, count = path, 1
    while os.path.lexists(name):
        name, count = f"{path}.{count}", count + 1
    return name


def _root_cause(error: Exception) -> str:
    """Returns the message of the operating system, or the first line of the error."""
    code = getattr(error, "errno", None) or re.search(
        r"os_error_code='(\d+)'", str(error)
    )
    if code is None:
        return first_line(error)
    return os.strerror(code if isinstance(code, int) else int(code[1]))
