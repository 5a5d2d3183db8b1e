"""Barriers and key-value exchange between processes, with timeouts.

Processes that run different programs deadlock in their first collective. The checks
here use the barriers and the key-value store of JAX's coordination service instead of
collectives, so they end with an error that names the missing process or the mismatch.
"""

import collections
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from localsgd_jax.distributed._jax_internals import (
    coordination_client,
    is_deadline_exceeded,
    processes_missing_at_barrier,
)
from localsgd_jax.distributed.background import submit_daemon
from localsgd_jax.distributed.mismatches import describe_mismatches, format_processes

# After a mismatch, process 0 may exit and end the coordination service. It waits this
# long until all processes have read the fingerprints.
READ_TIMEOUT_SECONDS = 5.0
POLL_INTERVAL_SECONDS = 60.0


class CoordinationError(RuntimeError):
    """Mismatch between processes of a job, or a missing process."""


class JobState:
    """Process-wide state of the coordination: settings and sequence numbers.

    Attributes:
      timeout: seconds to wait for other processes; set by `initialize(timeout=)`.
      recoverable: whether JAX keeps the job alive when a process fails; set by
        `initialize(recoverable=)`.
      has_peers: whether this process belongs to a job of several processes, also if
        they could not be connected.
      num_coordinators: number of `Coordinator` objects by call and group. All
        processes of a group make the same calls in the same order, so equal numbers
        give equal keys in the store.
    """

    def __init__(self) -> None:
        """Sets the defaults of a program without other processes."""
        self.timeout, self.recoverable, self.has_peers = 300.0, False, False
        self.num_coordinators: collections.Counter = collections.Counter()


job_state = JobState()


class Coordinator:
    """All-gather, equality check and broadcast of JSON values between processes.

    All processes of the group create their coordinators and call the methods in the
    same order. Without other processes every method returns at once.
    """

    def __init__(self, call: str, processes: Sequence[int]) -> None:
        """Assigns the keys in the store; does not communicate.

        Args:
          call: public call for error messages, such as "train()".
          processes: process indices of the group.
        """
        self.call, self.processes = call, list(processes)
        self.timeout = job_state.timeout
        # The processes of a compile-only target do not run and cannot be waited for.
        self.is_single = len(self.processes) < 2 or jax.process_count() < 2
        group = f"{call}/{'-'.join(map(str, self.processes))}"
        job_state.num_coordinators[group] += 1
        self._prefix = f"localsgd/{group}/{job_state.num_coordinators[group]}/"
        self._num_exchanges, self._last_key = 0, ""

    def all_gather(self, message: object = None) -> dict[int, Any]:
        """Waits for all processes and returns their messages.

        A message is stored before a barrier and read after it, so all processes read
        the same messages.

        Args:
          message: JSON-serialisable value, or None to publish nothing.

        Returns:
          The messages by process index; without an entry for None.

        Raises:
          CoordinationError: if a process fails, or does not reach the barrier within
            the timeout of `initialize`; the message names it.
        """
        if self.is_single:
            return {} if message is None else {jax.process_index(): message}
        if missing := self._publish(message):
            raise CoordinationError(f"{self.call}: {missing}")
        return self._read()

    def assert_equal(self, fingerprint: Mapping[str, object]) -> None:
        """Raises the same error in all processes unless their fingerprints are equal.

        Args:
          fingerprint: JSON-serialisable values by name.

        Raises:
          CoordinationError: names the entries that differ or the missing processes.
        """
        if self.is_single:
            return
        missing = self._publish(fingerprint)
        mismatches = describe_mismatches(self._read())
        if not missing and not mismatches:
            return
        if not missing:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._wait_at_barrier("read", READ_TIMEOUT_SECONDS)
        problems = [missing, *mismatches] if missing else mismatches
        raise CoordinationError(f"{self.call}: {'; '.join(problems)}")

    def broadcast(self, compute: Callable[[], object]) -> object:
        """Computes a value in the lowest-ranked process and sends it to all processes.

        The other processes wait without a time limit, because a computation such as an
        evaluation may take longer than the timeout of a barrier. If the computing
        process fails, the coordination service reports it.

        Args:
          compute: called in the lowest process only; returns a JSON-serialisable value.

        Returns:
          The value.

        Raises:
          CoordinationError: in the other processes, if `compute` raises; the lowest
            process raises the error of `compute`.
        """
        if self.is_single:
            return compute()
        key, root = f"{self._prefix}result", min(self.processes)
        if jax.process_index() != root:
            message = json.loads(_wait_for_key(key))
            if "error" in message:
                raise CoordinationError(
                    f"{self.call}: process {root} raised {message['error']}"
                )
            return message["value"]
        store = coordination_client()
        try:
            value = compute()
            reply = json.dumps({"value": value})
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            store.key_value_set(key, json.dumps({"error": reason}))
            raise
        store.key_value_set(key, reply)
        return value

    def _publish(self, message: object) -> str:
        """Stores a message and waits for all; returns an error text on a failure."""
        store, previous_key = coordination_client(), self._last_key
        self._num_exchanges, self._last_key = self._num_exchanges + 1, ""
        if message is not None:
            self._last_key = f"{self._directory()}{jax.process_index()}"
            store.key_value_set(self._last_key, json.dumps(message))
        wait = self._wait_for_live if job_state.recoverable else self._wait_for_all
        if missing := wait():
            return missing
        if previous_key:  # All processes are past their previous read.
            store.key_value_delete(previous_key)
        return ""

    def _wait_for_all(self) -> str:
        """Waits at a barrier, which JAX fails if a process fails."""
        try:
            self._wait_at_barrier("all_gather", self.timeout)
        except jax.errors.JaxRuntimeError as error:
            if not is_deadline_exceeded(error):
                raise self._service_error(error) from error
            return self._describe_late(processes_missing_at_barrier(error))
        return ""

    def _wait_for_live(self) -> str:
        """Waits until each process has arrived or failed.

        In a recoverable job a barrier ignores failures and would wait for its timeout.
        `get_live_nodes` returns when all processes with a heartbeat have called it.
        """
        client, me = coordination_client(), jax.process_index()
        arrivals, timeouts = (
            f"{self._prefix}{name}/{self._num_exchanges}/"
            for name in ("arrivals", "timeouts")
        )
        client.key_value_set(f"{arrivals}{me}", "")
        future = submit_daemon(client.get_live_nodes, self.processes)
        try:
            live = future.result(self.timeout)
        except TimeoutError:
            keys = [key for key, _ in client.key_value_dir_get(arrivals)]
            arrived = {int(key.rpartition("/")[2]) for key in keys}
            reason = self._describe_late(sorted(set(self.processes) - arrived))
            client.key_value_set(f"{timeouts}{me}", reason)
            return reason
        except jax.errors.JaxRuntimeError as error:
            raise self._service_error(error) from error
        if failed := sorted(set(self.processes) - set(live)):
            return f"{format_processes(failed)} failed (exit or heartbeat timeout)"
        if reasons := client.key_value_dir_get(timeouts):  # This process is late.
            return reasons[0][1]
        client.key_value_delete(f"{arrivals}{me}")
        return ""

    def _describe_late(self, processes: Sequence[int]) -> str:
        """Returns the error text for processes that have not reached a barrier."""
        names = format_processes(processes) if processes else "a process"
        return f"{names} did not reach the barrier within {self.timeout:g} s (timeout)"

    def _service_error(self, error: Exception) -> CoordinationError:
        """Converts an error of the coordination service."""
        return CoordinationError(f"{self.call}: {str(error).splitlines()[0]}")

    def _read(self) -> dict[int, Any]:
        """Returns the messages of the current exchange by process index."""
        entries = coordination_client().key_value_dir_get(self._directory())
        return {int(key.rpartition("/")[2]): json.loads(text) for key, text in entries}

    def _directory(self) -> str:
        """Returns the key prefix of the messages of the current exchange."""
        return f"{self._prefix}{self._num_exchanges}/"

    def _wait_at_barrier(self, name: str, seconds: float) -> None:
        """Waits until all processes of the group have reached a barrier."""
        coordination_client().wait_at_barrier(
            f"{self._prefix}{name}", int(seconds * 1000), self.processes
        )


def assert_equal_across_processes(
    call: str, fingerprint: Mapping[str, object], processes: Sequence[int]
) -> None:
    """Raises the same error in all processes unless their fingerprints are equal.

    Args:
      call: public call for error messages; all processes make the same calls.
      fingerprint: JSON-serialisable values by name.
      processes: process indices to compare.

    Raises:
      CoordinationError: names the entries that differ or the missing processes.
    """
    Coordinator(call, processes).assert_equal(fingerprint)


def broadcast_from_first(
    call: str, compute: Callable[[], object], processes: Sequence[int]
) -> object:
    """Computes a value in the lowest-ranked process and sends it to all processes.

    Args:
      call: public call for error messages; all processes make the same calls.
      compute: called in the lowest process only; returns a JSON-serialisable value.
      processes: process indices that take part.

    Returns:
      The value.

    Raises:
      CoordinationError: in the other processes, if `compute` raises.
    """
    return Coordinator(call, processes).broadcast(compute)


def _wait_for_key(key: str) -> str:
    """Waits for a key of the store; the service raises if process 0 fails."""
    milliseconds = int(POLL_INTERVAL_SECONDS * 1000)
    while True:
        try:
            return coordination_client().blocking_key_value_get(key, milliseconds)
        except jax.errors.JaxRuntimeError as error:
            if not is_deadline_exceeded(error):
                raise
