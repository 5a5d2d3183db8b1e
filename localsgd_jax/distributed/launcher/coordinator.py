"""Supervision of process 0 through the port of its coordinator.

The port first belongs to the rendezvous and then to JAX's coordination service. Both
answer a line of text at once: the rendezvous closes the connection, and the service
sends HTTP/2 settings. A process that is stopped, or hangs as a whole, accepts
connections (the kernel does) but does not answer.
"""

import enum
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

CHECK_INTERVAL_SECONDS = 1.0
CONTACT_TIMEOUT_SECONDS = 1.0
ABORT_CODE = 128 + signal.SIGABRT


class Reply(enum.Enum):
    """Reaction of the coordinator's port to a connection."""

    ANSWERED = "process 0 responds"
    NO_ANSWER = "the port is open, without a response"
    NOT_LISTENING = "no process listens"


class PeerFailure(NamedTuple):
    """Failure of a process other than 0.

    Attributes:
      process: index of the process.
      reason: text such as "exited with 137".
    """

    process: int
    reason: str


class CoordinatorMonitor(threading.Thread):
    """Thread that reports failures to process 0 and notices when it hangs.

    The rendezvous of process 0 receives a report of each process that has exited, or
    has been stopped by a signal for the grace period. It would otherwise wait for that
    process until its timeout. JAX's coordination service, which follows, ignores the
    report and relies on heartbeats.

    Process 0 hangs if it does not answer for the grace period although

    - another process was aborted, as JAX does when process 0 does not respond, or
    - all other processes have exited or are stopped by a signal, or
    - it is itself stopped by a signal before it listens.

    A scheduler that suspends a job stops the launcher, too.

    Only the time of the attempts counts, so that a launcher that was itself stopped
    does not take its own absence for that of process 0. A process 0 that works after
    the end of its coordination service is not stopped and does not listen, so it does
    not count as hanging.
    """

    def __init__(
        self,
        address: tuple[str, int],
        job_id: str,
        grace_period: float,
        report_hang: Callable[[], None],
    ) -> None:
        """Prepares the thread.

        Args:
          address: host and port of the coordinator.
          job_id: identifier of this start of the job.
          grace_period: seconds without an answer after which process 0 hangs.
          report_hang: called once when process 0 hangs.
        """
        super().__init__(daemon=True)
        self._address, self._job_id = address, job_id
        self._grace_period, self._report_hang = grace_period, report_hang
        self._pids: list[int] = []
        self._running_peers: set[int] = set()
        self._has_aborted_peer = False
        self._unreported: list[PeerFailure] = []
        self._stopped_seconds: dict[int, float] = {}
        self._stop_requested = threading.Event()

    def supervise(self, pids: Sequence[int]) -> None:
        """Starts the thread, if there is more than one process.

        Args:
          pids: process ids, process 0 first.
        """
        self._pids, self._running_peers = list(pids), set(range(1, len(pids)))
        if self._running_peers:
            self.start()

    def on_peer_exit(self, process: int, code: int) -> None:
        """Records the exit of a process other than 0.

        Args:
          process: index of the process.
          code: exit code, as a shell gives it.
        """
        self._has_aborted_peer |= code == ABORT_CODE
        self._running_peers.discard(process)
        self._unreported.append(PeerFailure(process, f"exited with {code}"))

    def stop(self) -> None:
        """Ends the supervision."""
        self._stop_requested.set()

    def run(self) -> None:
        """Checks the processes until `stop` or until process 0 hangs."""
        unanswered_seconds = 0.0
        while not self._stop_requested.wait(CHECK_INTERVAL_SECONDS):
            self._find_stopped_peers()
            start = time.monotonic()
            if not self._is_hanging():
                unanswered_seconds = 0.0
                continue
            # An attempt takes no longer, unless the launcher itself was stopped.
            seconds = min(time.monotonic() - start, CONTACT_TIMEOUT_SECONDS)
            unanswered_seconds += seconds + CHECK_INTERVAL_SECONDS
            if unanswered_seconds >= self._grace_period:
                self._report_hang()
                return

    def _find_stopped_peers(self) -> None:
        """Adds processes that have been stopped for the grace period."""
        for process in list(self._running_peers):
            if not is_stopped(self._pids[process]):
                self._stopped_seconds.pop(process, None)
                continue
            before = self._stopped_seconds.get(process, 0.0)
            after = self._stopped_seconds[process] = before + CHECK_INTERVAL_SECONDS
            if before < self._grace_period <= after:
                reason = f"has been stopped by a signal for {self._grace_period:g} s"
                self._unreported.append(PeerFailure(process, reason))

    def _is_hanging(self) -> bool:
        """Contacts process 0 if there is a reason; returns whether it hangs."""
        stopped_peers = self._stopped_seconds.keys()
        must_answer = self._has_aborted_peer or self._running_peers <= stopped_peers
        stopped = is_stopped(self._pids[0])
        if not (must_answer or stopped or self._unreported):
            return False
        reply = contact(self._address, self._next_report())
        if reply is Reply.ANSWERED:
            self._has_aborted_peer = False  # For a reason of its own.
            del self._unreported[:1]
        if reply is Reply.NOT_LISTENING:
            return stopped
        return reply is Reply.NO_ANSWER and must_answer

    def _next_report(self) -> Mapping:
        """Returns the message about the first failure that is not reported yet."""
        if not self._unreported:
            return {}
        process, reason = self._unreported[0]
        return {"failed": process, "reason": reason, "job_id": self._job_id}


def contact(address: tuple[str, int], message: Mapping) -> Reply:
    """Sends a line of JSON to the coordinator's port and waits for a reaction.

    Args:
      address: host and port.
      message: JSON-serialisable values.

    Returns:
      The reaction.
    """
    try:
        with socket.create_connection(address, CONTACT_TIMEOUT_SECONDS) as connection:
            connection.sendall(json.dumps(message).encode() + b"\n")
            connection.recv(1)
    except TimeoutError:
        return Reply.NO_ANSWER
    except ConnectionRefusedError:
        return Reply.NOT_LISTENING
    except OSError:  # The other side has closed the connection.
        return Reply.ANSWERED
    return Reply.ANSWERED


def is_stopped(pid: int) -> bool:
    """Returns whether a child process is stopped by a signal.

    Args:
      pid: process id of a child.

    Returns:
      Whether it is stopped; False if it has exited.
    """
    flags = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
    try:
        return os.waitid(os.P_PID, pid, flags) is not None
    except ChildProcessError:
        return False
