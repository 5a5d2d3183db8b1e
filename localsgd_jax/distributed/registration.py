"""Server of the TCP rendezvous: registration of the other processes at process 0.

One thread reads all connections as they become readable, so a slow or silent client
delays no other one. Each client has one deadline for its whole message, and the
registration has one deadline for all clients.
"""

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Mapping
from types import TracebackType

from localsgd_jax.distributed.mismatches import format_processes

IO_TIMEOUT_SECONDS = 5.0
MAX_MESSAGE_BYTES = 1 << 16
MAX_UNREGISTERED = 256
MAX_PING_INTERVAL_SECONDS = 1.0
PING = b"\n"


class Client:
    """Connection to the registration server.

    Attributes:
      connection: socket without blocking.
      deadline: time on the monotonic clock until which the client must have sent its
        message, or have closed the connection after a rejection.
      received: bytes of the message so far.
      process_id: index of the process after its registration; None before.
      is_rejected: whether an error was sent to it.
      last_response: time of the last bytes from it.
      must_respond: whether it has not responded since all processes are registered.
    """

    def __init__(self, connection: socket.socket) -> None:
        """Starts the deadline of a new connection."""
        connection.setblocking(False)
        self.connection, self.received = connection, b""
        self.process_id: int | None = None
        self.is_rejected, self.must_respond = False, True
        self.last_response = time.monotonic()
        self.deadline = self.last_response + IO_TIMEOUT_SECONDS

    def receive(self) -> bytes:
        """Returns the bytes that have arrived; empty if the connection is closed."""
        try:
            return self.connection.recv(4096)
        except BlockingIOError:
            return PING
        except OSError:
            return b""

    def send(self, text: bytes) -> None:
        """Sends bytes; ignores a closed connection or one that does not read."""
        with contextlib.suppress(OSError):
            self.connection.sendall(text)


class RegistrationServer:
    """Registrations of the processes of a job, as a context manager.

    Attributes:
      fingerprints: fingerprint of each registered process, and of process 0.
    """

    def __init__(
        self,
        listener: socket.socket,
        fingerprint: Mapping,
        num_processes: int,
        heartbeat_timeout: float,
    ) -> None:
        """Accepts connections of a listening socket; reads none yet.

        Args:
          listener: listening socket.
          fingerprint: fingerprint of process 0; "job_id" identifies the job.
          num_processes: number of processes in the job.
          heartbeat_timeout: seconds without a response after which a registered
            process counts as failed.
        """
        self.fingerprints = {0: dict(fingerprint)}
        self._num_processes, self._heartbeat_timeout = num_processes, heartbeat_timeout
        self._ping_interval = min(MAX_PING_INTERVAL_SECONDS, heartbeat_timeout / 4)
        self._next_ping, self._failure = 0.0, ""
        self._clients: list[Client] = []
        self._listener = listener
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def wait_for_all(self, timeout: float) -> str:
        """Waits until all processes are registered and respond.

        Args:
          timeout: seconds to wait for all processes together.

        Returns:
          An error text if a process is missing or has failed; otherwise empty.
        """
        deadline = time.monotonic() + timeout
        while not self._failure and not self._is_complete():
            now = time.monotonic()
            if now >= deadline:
                return self._describe_missing(timeout)
            self._check_clients(now)
            if now >= self._next_ping:
                self._ping(now)
            self._handle_events(min(deadline, self._next_ping) - now)
        return self._failure

    def reply_to_all(self, message: Mapping) -> None:
        """Sends a message to all registered processes and waits until they close.

        The side that closes first keeps the port in TIME_WAIT, and JAX needs it next.
        All clients together have `IO_TIMEOUT_SECONDS`.

        Args:
          message: reply of process 0.
        """
        self._selector.unregister(self._listener)
        for client in list(self._clients):
            if client.process_id is None and not client.is_rejected:
                self._close(client)
            elif client.process_id is not None:
                self._reject(client, message)
        deadline = time.monotonic() + IO_TIMEOUT_SECONDS
        while self._clients and (left := deadline - time.monotonic()) > 0:
            self._handle_events(left)

    def __enter__(self) -> "RegistrationServer":
        """Returns the server."""
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes all connections."""
        for client in list(self._clients):
            self._close(client)
        self._selector.close()

    def _registered(self) -> list[Client]:
        """Returns the clients that are processes of the job."""
        return [client for client in self._clients if client.process_id is not None]

    def _is_complete(self) -> bool:
        """Returns whether all processes are registered and have responded since."""
        return len(self.fingerprints) == self._num_processes and not any(
            client.must_respond for client in self._registered()
        )

    def _describe_missing(self, timeout: float) -> str:
        """Returns the error text for processes that have not registered in time."""
        missing = sorted(set(range(self._num_processes)) - set(self.fingerprints))
        if not missing:
            waiting = [c for c in self._registered() if c.must_respond]
            late = [c.process_id for c in waiting if c.process_id is not None]
            return f"{format_processes(late)} did not respond (timeout)"
        return (
            f"{format_processes(missing)} of {self._num_processes} did not reach the "
            f"rendezvous within {timeout:g} s (timeout)"
        )

    def _check_clients(self, now: float) -> None:
        """Closes clients after their deadline; notices processes that hang."""
        for client in list(self._clients):
            if client.process_id is None:
                if now >= client.deadline:
                    self._close(client)
            elif now - client.last_response >= self._heartbeat_timeout:
                self._failure = (
                    f"process {client.process_id} did not respond within "
                    f"{self._heartbeat_timeout:g} s (heartbeat timeout)"
                )

    def _ping(self, now: float) -> None:
        """Sends an empty line to each registered process."""
        self._next_ping = now + self._ping_interval
        for client in self._registered():
            client.send(PING)

    def _handle_events(self, seconds: float) -> None:
        """Waits for connections and bytes, and handles them."""
        for key, _ in self._selector.select(max(seconds, 0)):
            if key.data is None:
                self._accept()
            elif key.data in self._clients:
                self._read(key.data)

    def _accept(self) -> None:
        """Accepts a connection; closes the oldest one beyond the limit."""
        unregistered = [client for client in self._clients if client.process_id is None]
        if len(unregistered) >= MAX_UNREGISTERED:
            self._close(unregistered[0])
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        client = Client(connection)
        self._clients.append(client)
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _close(self, client: Client) -> None:
        """Closes a connection."""
        self._selector.unregister(client.connection)
        self._clients.remove(client)
        client.connection.close()

    def _read(self, client: Client) -> None:
        """Handles bytes or the end of a connection."""
        chunk = client.receive()
        if not chunk:
            if client.process_id is not None:
                self._failure = f"process {client.process_id} closed its connection"
            self._close(client)
        elif client.process_id is not None:
            client.last_response, client.must_respond = time.monotonic(), False
        elif not client.is_rejected:
            client.received += chunk
            is_json, size = client.received[:1] == b"{", len(client.received)
            if client.received.endswith(b"\n") and is_json:
                self._handle_message(client, parse_message(client.received) or {})
            elif not is_json or size >= MAX_MESSAGE_BYTES:
                self._close(client)

    def _handle_message(self, client: Client, message: Mapping) -> None:
        """Registers a process, or takes the launcher's report of a failure."""
        job_id = self.fingerprints[0].get("job_id")
        process_id, fingerprint = message.get("process_id"), message.get("fingerprint")
        failed = message.get("failed")
        if type(failed) is int and message.get("job_id") == job_id:
            self._close(client)
            reason = message.get("reason")
            self._failure = f"process {failed} {reason} before it was connected"
        elif type(process_id) is not int or not isinstance(fingerprint, dict):
            self._close(client)
        elif error := self._find_error(process_id, fingerprint.get("job_id"), job_id):
            self._reject(client, {"error": error})
        else:
            self.fingerprints[process_id] = fingerprint
            client.process_id = process_id
            for other in self._registered():
                other.must_respond = True
            self._next_ping = 0.0

    def _find_error(self, process_id: int, peer_job_id: object, job_id: object) -> str:
        """Returns why a process cannot be registered; empty if it can."""
        count = self._num_processes
        if peer_job_id != job_id:
            return (
                f"process {process_id} belongs to job {peer_job_id!r}, process 0 to "
                f"job {job_id!r}"
            )
        if process_id in self.fingerprints:
            return f"process {process_id} of {count} is already registered"
        if process_id not in range(count):
            return f"process_id must be less than {count}, got {process_id}"
        return ""

    def _reject(self, client: Client, message: Mapping) -> None:
        """Sends the final message to a client, which then closes the connection."""
        client.send(json.dumps(message).encode() + b"\n")
        client.process_id, client.is_rejected = None, True
        client.deadline = time.monotonic() + IO_TIMEOUT_SECONDS


def parse_message(line: bytes) -> dict | None:
    """Parses one line of JSON; returns None for anything but an object.

    Args:
      line: bytes of the line.

    Returns:
      The message.

    Example:
      >>> parse_message(b'{"error": ""}')
      {'error': ''}
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
