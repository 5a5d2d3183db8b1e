"""TCP rendezvous of all processes before `jax.distributed.initialize`.

JAX aborts a process when its wait for another one times out, and accepts processes of
another job at its coordination service. Therefore all processes first connect to the
coordinator's port in plain TCP. Each message is one line of JSON. A process registers
with its index and the fingerprint of its environment; process 0 compares the
fingerprints and replies with an error text, which is empty if all of them match.

Until then process 0 sends empty lines, which the others return, so that both sides
notice a process that has exited or does not respond.
"""

import json
import socket
import time
from collections.abc import Mapping

from localsgd_jax.distributed.coordination import CoordinationError
from localsgd_jax.distributed.environment import parse_address
from localsgd_jax.distributed.mismatches import describe_mismatches
from localsgd_jax.distributed.registration import (
    IO_TIMEOUT_SECONDS,
    MAX_MESSAGE_BYTES,
    PING,
    RegistrationServer,
    parse_message,
)

RETRY_INTERVAL_SECONDS = 0.1


def serve(
    bind_address: str,
    fingerprint: Mapping,
    num_processes: int,
    timeout: float,
    heartbeat_timeout: float,
) -> None:
    """Accepts all processes as process 0 and replies with the result.

    Args:
      bind_address: HOST:PORT to listen on.
      fingerprint: values that must be equal in all processes; "job_id" identifies the
        job.
      num_processes: number of processes in the job.
      timeout: seconds to wait for the other processes.
      heartbeat_timeout: seconds without a response after which a registered process
        counts as failed.

    Raises:
      CoordinationError: if the port is in use, a process is missing or fails, or
        fingerprints differ.
    """
    with (
        _listen(bind_address) as listener,
        RegistrationServer(
            listener, fingerprint, num_processes, heartbeat_timeout
        ) as server,
    ):
        failure = server.wait_for_all(timeout)
        problems = [failure, *describe_mismatches(server.fingerprints)]
        error = "; ".join(filter(None, problems))
        server.reply_to_all({"error": error})
    if error:
        raise CoordinationError(f"initialize(): {error}")


def join(
    address: str,
    fingerprint: Mapping,
    process_id: int,
    timeout: float,
    heartbeat_timeout: float,
) -> None:
    """Registers at process 0 and waits for the result.

    Args:
      address: HOST:PORT of process 0.
      fingerprint: values that must be equal in all processes.
      process_id: index of this process.
      timeout: seconds to wait for process 0.
      heartbeat_timeout: seconds without a message after which process 0 counts as
        failed.

    Raises:
      CoordinationError: if process 0 does not reply, belongs to another job, or
        reports an error.
    """
    registration = {"process_id": process_id, "fingerprint": fingerprint}
    with _connect_with_retry(address, process_id, timeout) as connection:
        try:
            connection.sendall(json.dumps(registration).encode() + b"\n")
            reply = _receive_reply(connection, timeout, heartbeat_timeout)
        except TimeoutError:
            raise CoordinationError(
                f"initialize(): process 0 at {address} did not respond to process "
                f"{process_id} within {heartbeat_timeout:g} s (heartbeat timeout)"
            ) from None
        except OSError:
            reply = None
    if reply is None or "error" not in reply:
        raise CoordinationError(
            f"initialize(): no rendezvous reply from {address} for process "
            f"{process_id}: the job started without it, the port belongs to another "
            "program, or process 0 failed"
        )
    if reply["error"]:
        raise CoordinationError(f"initialize(): {reply['error']}")


def _listen(bind_address: str) -> socket.socket:
    """Returns a listening socket; for all interfaces with IPv4 and IPv6."""
    host, port = parse_address(bind_address)
    all_interfaces = host in ("::", "0.0.0.0")
    dual_stack = all_interfaces and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual_stack or ":" in host else socket.AF_INET
    try:
        return socket.create_server(
            ("" if all_interfaces else host, port),
            family=family,
            dualstack_ipv6=dual_stack,
        )
    except OSError as error:
        raise CoordinationError(
            f"initialize(): process 0 cannot listen on {bind_address} "
            f"({error.strerror}); the port is used by another job or program, or the "
            "address belongs to another machine"
        ) from error


def _connect_with_retry(address: str, process_id: int, timeout: float) -> socket.socket:
    """Connects to process 0; retries until it listens."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection(parse_address(address), IO_TIMEOUT_SECONDS)
        except OSError as error:
            if time.monotonic() > deadline:
                raise CoordinationError(
                    f"initialize(): process {process_id} could not connect to process "
                    f"0 at {address} within {timeout:g} s ({error}); it started too "
                    "late, has another coordinator_address, or process 0 failed"
                ) from None
            time.sleep(RETRY_INTERVAL_SECONDS)


def _receive_reply(
    connection: socket.socket, timeout: float, heartbeat_timeout: float
) -> dict | None:
    """Returns the reply of process 0; returns its pings before.

    Returns:
      The reply; None if the connection is closed or the message is not a reply.

    Raises:
      TimeoutError: if process 0 sends nothing for `heartbeat_timeout` seconds.
      OSError: if the connection fails.
    """
    deadline = time.monotonic() + timeout + IO_TIMEOUT_SECONDS
    line = b""
    while len(line) < MAX_MESSAGE_BYTES and (left := deadline - time.monotonic()) > 0:
        connection.settimeout(min(heartbeat_timeout, left))
        chunk = connection.recv(4096)
        if not chunk:
            return None
        line += chunk
        while line.startswith(PING):
            line = line.removeprefix(PING)
            connection.sendall(PING)
        if line and (line[:1] != b"{" or line.endswith(b"\n")):
            return parse_message(line)
    return None
