"""Membership of live processes, and retried calls that all of them execute.

`jax.experimental.multihost_utils.live_devices` has the same barriers and the same
all-or-nothing semantics, but it does not suffice here (JAX 0.10 to 0.12):

- Neither its barriers nor the code in its `with` block have a timeout. A process that
  hangs while its heartbeats continue would block all others indefinitely.
- It detects failed processes only. If the code raises in a live process, the others
  wait for that process in a collective and do not receive the error. Here a failure is
  published in the key-value store, and the other processes cancel.
- It does not retry, and it keeps the live devices of the previous block in a global
  object.

This module uses the same primitive of JAX's coordination service, `get_live_nodes`.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from localsgd_jax.core.validation import check_number, check_type
from localsgd_jax.distributed._jax_internals import coordination_client
from localsgd_jax.distributed.background import submit_daemon

POLL_INTERVAL_SECONDS = 0.25
MAX_FAILED_ATTEMPTS = 3
_instance_ids = itertools.count()


class MembershipError(RuntimeError):
    """The live processes cannot continue; the job has to be restarted."""


class Membership:
    """Live processes of a job.

    A call counts only if every live process has completed it:

        live processes   barrier over the processes with a heartbeat, however slow
        call(devices)    with the devices of these, cancelled after `timeout` seconds
        live processes   the same, and none has failed; otherwise the call is retried

    A process is live while its heartbeats reach process 0.

    Attributes:
      devices: devices of all processes.
      processes: indices of all processes at the start, ascending.
      process_index: index of this process.
      live: indices of the live processes in the last attempt, ascending.
    """

    def __init__(
        self, devices: Sequence, timeout: float = 60.0, straggler_timeout: float = 600.0
    ) -> None:
        """Starts with all processes; does not communicate.

        Args:
          devices: devices of all processes.
          timeout: seconds that one call may take once all live processes have arrived.
          straggler_timeout: seconds to wait for a process that is live and does not
            arrive.

        Raises:
          TypeError: if an argument has the wrong type.
          ValueError: if a number of seconds is not positive and finite.
        """
        check_type("Membership(devices)", "devices", devices, Sequence, np.ndarray)
        for name, value in (
            ("timeout", timeout),
            ("straggler_timeout", straggler_timeout),
        ):
            check_number(f"Membership({name})", name, value, above=0)
        for device in devices:
            text = "each of the devices must be a jax.Device"
            if not hasattr(device, "process_index"):
                raise TypeError(f"Membership(devices): {text}, got {device!r}")
        self.devices = list(devices)
        self.processes = sorted({device.process_index for device in devices})
        self.process_index = jax.process_index()
        self.live = list(self.processes)
        self._timeout, self._straggler_timeout = timeout, straggler_timeout
        # Equal in all processes, which create their instances in the same order.
        self._instance_id, self._attempt = next(_instance_ids), 0
        self._client: Any = coordination_client()

    def run_atomically(self, call: Callable[[list], Any]) -> Any:
        """Calls a function with the devices of all live processes, in each of them.

        Args:
          call: `call(devices)`; must be repeatable. All processes make the same calls
            in the same order.

        Returns:
          The value of the attempt that has succeeded in all live processes.

        Raises:
          MembershipError: if this process was marked as failed, a live process does not
            arrive, or `MAX_FAILED_ATTEMPTS` attempts fail without a failed process.
        """
        check_type("run_atomically(call)", "call", call, Callable)
        if len(self.processes) == 1:
            return call(self.devices)
        failed_attempts = 0
        while True:
            self._attempt += 1
            before = self._live_processes()
            self.live = sorted(before)
            result, error = self._run_once(call)
            after = self._live_processes()
            failures = self._client.key_value_dir_get(self._failure_prefix())
            if after == before and not failures:
                return result
            failed_attempts += after == before
            if failed_attempts == MAX_FAILED_ATTEMPTS:
                raise MembershipError(
                    f"run_atomically(): {MAX_FAILED_ATTEMPTS} attempts failed although "
                    f"no process has failed: {failures[0][1]}"
                ) from error

    def _run_once(self, call: Callable[[list], Any]) -> tuple[Any, Exception | None]:
        """Runs a call; cancels it after the timeout or a failure in another process."""
        devices = [d for d in self.devices if d.process_index in self.live]
        future = submit_daemon(call, devices)
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return future.result(min(POLL_INTERVAL_SECONDS, self._timeout)), None
            except Exception as error:
                if future.done():
                    return None, self._report_failure(error)
            if time.monotonic() > deadline:
                error = TimeoutError(f"no result within {self._timeout:g} s")
                return None, self._report_failure(error)
            if self._client.key_value_dir_get(self._failure_prefix()):
                return None, None

    def _report_failure(self, error: Exception) -> Exception:
        """Publishes an error, without which other processes could wait indefinitely."""
        reason = f"process {self.process_index}: {type(error).__name__}: {error}"
        key = f"{self._failure_prefix()}{self.process_index}"
        self._client.key_value_set(key, reason.splitlines()[0])
        return error

    def _failure_prefix(self) -> str:
        """Returns the key prefix under which failures of this attempt are stored."""
        return f"localsgd/membership/{self._instance_id}/{self._attempt}/"

    def _live_processes(self) -> dict[int, int]:
        """Waits for all live processes; returns the incarnation number of each."""
        future = submit_daemon(self._client.get_live_nodes, self.processes)
        try:
            live = future.result(self._straggler_timeout)
        except TimeoutError:
            raise MembershipError(
                "run_atomically(): a process with a heartbeat did not arrive within "
                f"{self._straggler_timeout:g} s (straggler timeout)"
            ) from None
        except jax.errors.JaxRuntimeError as error:
            raise MembershipError(
                "run_atomically(): the coordination service in process 0 does not "
                "respond, or this process was marked as failed (missed heartbeats): "
                f"{str(error).splitlines()[0]}"
            ) from error
        if self.process_index not in live:
            raise MembershipError(
                "run_atomically(): this process was marked as failed (missed "
                "heartbeats)"
            )
        return live
