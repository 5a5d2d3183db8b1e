"""The processes that live, and what they do together though any may die."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

# JAX has no public name for the client of its coordination service.
from jax._src.distributed import global_state

from localsgd_jax.apart import in_background

LOOK_EVERY = 0.25
STRIKES = 3
_numbers = itertools.count()


class CompanyError(RuntimeError):
    """The processes cannot go on together; the job has to be started again."""


class Company:
    """Those processes of a job that live.

    What is done together counts only when every living process has done it:

        who lives?     a barrier for those who do, however late they come
        call(devices)  of the living, given up after `timeout` seconds
        who lives?     the same ones, and none has failed: else once more

    A process lives as long as its heartbeats reach process 0.
    """

    def __init__(
        self, devices: Sequence, timeout: float = 60.0, patience: float = 600.0
    ) -> None:
        """Asks nobody yet.

        Args:
          devices: of all processes.
          timeout: seconds that one call may take once all are there.
          patience: seconds to wait for a process that lives and does not come.
        """
        self.devices, self.timeout, self.patience = list(devices), timeout, patience
        self.everyone = sorted({device.process_index for device in devices})
        self.me = jax.process_index()
        self.living, self.turn, self.number = list(self.everyone), 0, next(_numbers)
        self.client: Any = global_state.client

    def together(self, call: Callable[[list], Any]) -> Any:
        """Calls a function with the devices of all living processes, in each of them.

        Args:
          call: must be able to run again; made by all processes in the same order.

        Returns:
          What it returned, when it has in all processes that live now.

        Raises:
          CompanyError: if this process counts as dead, a living one does not come, or
            the call fails again and again although nobody dies.
        """
        if len(self.everyone) == 1:
            return call(self.devices)
        strikes = 0
        while True:
            self.turn += 1
            before = self._who_lives()
            self.living = sorted(before)
            result, error = self._attempt(call)
            after = self._who_lives()
            failed = self.client.key_value_dir_get(self._failures())
            if after == before and not failed:
                return result
            strikes += after == before
            if strikes == STRIKES:
                raise CompanyError(
                    f"together(): {STRIKES} attempts have failed though nobody has died"
                    f": {failed[0][1]}"
                ) from error

    def _attempt(self, call: Callable[[list], Any]) -> tuple[Any, Exception | None]:
        """Runs a call; gives up when it takes too long or has failed elsewhere."""
        devices = [d for d in self.devices if d.process_index in self.living]
        future, deadline = in_background(call, devices), time.monotonic() + self.timeout
        while True:
            try:
                return future.result(min(LOOK_EVERY, self.timeout)), None
            except Exception as error:
                if future.done():
                    return None, self._failed(error)
            late = time.monotonic() > deadline
            if late or self.client.key_value_dir_get(self._failures()):
                error = TimeoutError(f"no answer within {self.timeout:g} s")
                return None, self._failed(error) if late else None

    def _failed(self, error: Exception) -> Exception:
        """Tells the others, who may wait for ever for what has failed here."""
        reason = f"process {self.me}: {type(error).__name__}: {error}".splitlines()[0]
        self.client.key_value_set(f"{self._failures()}{self.me}", reason)
        return error

    def _failures(self) -> str:
        """Returns where in the store those stand who have failed in this turn."""
        return f"localsgd/company/{self.number}/{self.turn}/"

    def _who_lives(self) -> dict[int, int]:
        """Waits for all who live; returns them with a number for each start."""
        asked = in_background(self.client.get_live_nodes, self.everyone)
        try:
            living = asked.result(self.patience)
        except TimeoutError:
            raise CompanyError(
                "together(): a process whose heart beats has not come within "
                f"{self.patience:g} s"
            ) from None
        except jax.errors.JaxRuntimeError as error:
            raise CompanyError(
                "together(): the service in process 0 does not answer, or counts this "
                f"process as dead: {str(error).splitlines()[0]}"
            ) from error
        if self.me not in living:
            raise CompanyError("together(): this process counts as dead")
        return living
