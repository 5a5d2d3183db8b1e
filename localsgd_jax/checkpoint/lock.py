"""Exclusive lock of a directory of checkpoints.

The lock is `flock` on a file in the directory. The kernel, or the server of a shared
file system, releases it when the process or its host fails. The file holds the owner
with a random token. On file systems that do not enforce `flock` between hosts, a second
job replaces the token, and the first job is refused at its next save.
"""

import datetime
import fcntl
import json
import os
import secrets
import socket
import weakref

import jax

from localsgd_jax.checkpoint.errors import CheckpointError
from localsgd_jax.distributed.environment import job_id

FILE_NAME = ".lock"
_open_locks: weakref.WeakSet = weakref.WeakSet()


class DirectoryLock:
    """Lock of a directory, held by one process until `release` or its end."""

    def __init__(self, directory: str) -> None:
        """Locks a directory.

        A lock whose process has ended is replaced.

        Args:
          directory: existing directory.

        Raises:
          CheckpointError: if another process, or another object of this process, holds
            the lock.
          OSError: if the file cannot be written.
        """
        self._directory = directory
        self._path = os.path.join(directory, FILE_NAME)
        self._owner = _describe_process()
        self._file = open(self._path, "a+")  # noqa: SIM115, closed by `release`.
        while not self._try_lock():
            self._file.close()
            self._file = open(self._path, "a+")  # noqa: SIM115
        self._file.truncate(0)
        self._file.write(json.dumps(self._owner))
        self._file.flush()
        os.fsync(self._file.fileno())
        _open_locks.add(self)

    def problem(self) -> str | None:
        """Returns why this process may not write into the directory any more."""
        if not self._is_current_file():
            return (
                f"{self._directory} was removed or replaced while it was in use; the "
                "checkpoints in it are lost"
            )
        owner = _read_owner(self._path)
        if owner != self._owner:
            return f"{self._directory} is in use by {_format_owner(owner)} now"
        return None

    def release(self) -> None:
        """Removes the file and the lock, unless another process has taken it."""
        if not self._file.closed:
            if self.problem() is None:
                os.unlink(self._path)
            self._file.close()

    def close_in_child(self) -> None:
        """Closes the file in a forked process, which would hold the lock, too."""
        self._file.close()

    def _try_lock(self) -> bool:
        """Locks the open file; returns whether it is still in the directory."""
        owner = _read_owner(self._path)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = False
        except BlockingIOError:
            is_held = True
        except OSError:  # A file system without flock.
            is_held = _runs_here(owner)
        if is_held:
            self._file.close()
            raise CheckpointError(
                f"RunCheckpointer(directory): {self._directory} is in use by "
                f"{_format_owner(owner)}; end it, or use another directory, or pass "
                "read_only=True to restore only"
            )
        return self._is_current_file()

    def _is_current_file(self) -> bool:
        """Returns whether the open file is the one in the directory."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except (OSError, ValueError):  # The file is removed, or closed in a child.
            return False


def _describe_process() -> dict:
    """Returns the entry of this process: ids, host, time and a random token."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "process": jax.process_index(),
        "job_id": job_id(),
        "since": now.isoformat(timespec="seconds"),
        "token": secrets.token_hex(8),
    }


def _read_owner(path: str) -> dict:
    """Returns the entry in a lock file; empty if there is none."""
    try:
        with open(path) as file:
            owner = json.load(file)
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _format_owner(owner: dict) -> str:
    """Formats an entry for an error message."""
    if not owner:
        return "another process"
    job = f", job {owner['job_id']}" if owner.get("job_id") else ""
    return (
        f"pid {owner.get('pid')} on host {owner.get('host')}{job}, "
        f"since {owner.get('since')}"
    )


def _runs_here(owner: dict) -> bool:
    """Returns whether the process of an entry runs on this host."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except PermissionError:
        return True
    except (OSError, KeyError, TypeError, ValueError):
        return False
    return True


def _close_in_child() -> None:
    """Closes the lock files that a forked process has inherited."""
    for lock in list(_open_locks):
        lock.close_in_child()


os.register_at_fork(after_in_child=_close_in_child)
