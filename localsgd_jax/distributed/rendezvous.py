"""TCP rendezvous of all processes before `jax.distributed.initialize`.

JAX aborts a process when its wait for another one times out, and accepts processes of
another job at its coordination service. Therefore all processes first connect to the
coordinator's port in plain TCP. Each message is one line of JSON. A process registers
with its index and the fingerprint of its environment; process 0 compares the
fingerprints and replies with an error text, which is empty if all of them match.
"""

import json
import socket
import time
from collections.abc import Mapping

from localsgd_jax.distributed.coordination import CoordinationError
from localsgd_jax.distributed.environment import parse_address
from localsgd_jax.distributed.mismatches import describe_mismatches, format_processes

MAX_MESSAGE_BYTES = 1 << 16
IO_TIMEOUT_SECONDS = 5.0
RETRY_INTERVAL_SECONDS = 0.1


def serve(
    bind_address: str, fingerprint: Mapping, num_processes: int, timeout: float
) -> None:
    """Accepts all processes as process 0 and replies with the result.

    Args:
      bind_address: HOST:PORT to listen on.
      fingerprint: values that must be equal in all processes; "job_id" identifies the
        job.
      num_processes: number of processes in the job.
      timeout: seconds to wait for the other processes.

    Raises:
      CoordinationError: if the port is in use, a process is missing, or fingerprints
        differ.
    """
    peers: dict[int, socket.socket] = {}
    fingerprints = {0: dict(fingerprint)}
    deadline = time.monotonic() + timeout
    with _listen(bind_address) as listener:
        try:
            while (
                len(fingerprints) < num_processes
                and (seconds_left := deadline - time.monotonic()) > 0
            ):
                listener.settimeout(seconds_left)
                try:
                    peer, _ = listener.accept()
                except TimeoutError:
                    break
                _accept_peer(peer, num_processes, fingerprints, peers)
            error = _compare(fingerprints, num_processes, timeout)
            for peer in peers.values():
                _send(peer, {"error": error})
            for peer in peers.values():
                _wait_closed(peer)
        finally:
            for peer in peers.values():
                peer.close()
    if error:
        raise CoordinationError(f"initialize(): {error}")


def join(address: str, fingerprint: Mapping, process_id: int, timeout: float) -> None:
    """Registers at process 0 and waits for the result.

    Args:
      address: HOST:PORT of process 0.
      fingerprint: values that must be equal in all processes.
      process_id: index of this process.
      timeout: seconds to wait for process 0.

    Raises:
      CoordinationError: if process 0 does not reply, belongs to another job, or
        reports an error.
    """
    with _connect_with_retry(address, process_id, timeout) as connection:
        connection.settimeout(timeout + IO_TIMEOUT_SECONDS)
        _send(connection, {"process_id": process_id, "fingerprint": fingerprint})
        try:
            reply = _receive(connection)
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


def _accept_peer(
    peer: socket.socket,
    num_processes: int,
    fingerprints: dict[int, dict],
    peers: dict[int, socket.socket],
) -> None:
    """Reads the registration of a peer; rejects peers of other jobs."""
    peer.settimeout(IO_TIMEOUT_SECONDS)
    try:
        message = _receive(peer) or {}
    except OSError:
        message = {}
    process_id, fingerprint = message.get("process_id"), message.get("fingerprint")
    if type(process_id) is not int or not isinstance(fingerprint, dict):
        peer.close()
        return
    job_id, peer_job_id = fingerprints[0].get("job_id"), fingerprint.get("job_id")
    rejection = ""
    if peer_job_id != job_id:
        rejection = (
            f"process {process_id} belongs to job {peer_job_id!r}, process 0 to job "
            f"{job_id!r}"
        )
    elif process_id in fingerprints:
        rejection = f"process {process_id} of {num_processes} is already registered"
    elif process_id not in range(num_processes):
        rejection = f"process_id must be less than {num_processes}, got {process_id}"
    if rejection:
        _send(peer, {"error": rejection})
        _wait_closed(peer)
        peer.close()
        return
    fingerprints[process_id], peers[process_id] = fingerprint, peer


def _compare(
    fingerprints: Mapping[int, Mapping], num_processes: int, timeout: float
) -> str:
    """Returns missing processes and mismatches as one text; empty without any."""
    problems = describe_mismatches(fingerprints)
    if missing := sorted(set(range(num_processes)) - set(fingerprints)):
        problems.insert(
            0,
            f"{format_processes(missing)} of {num_processes} did not reach the "
            f"rendezvous within {timeout:g} s (timeout)",
        )
    return "; ".join(problems)


def _send(connection: socket.socket, message: Mapping) -> None:
    """Sends one line of JSON; ignores a closed connection."""
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass


def _receive(connection: socket.socket) -> dict | None:
    """Receives one line of JSON; returns None for anything else."""
    raw = b""
    while not raw.endswith(b"\n") and len(raw) < MAX_MESSAGE_BYTES:
        chunk = connection.recv(4096)
        if not chunk:
            break
        raw += chunk
        if raw[:1] != b"{":
            return None
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _wait_closed(connection: socket.socket) -> None:
    """Waits until the peer has closed the connection.

    The side that closes first keeps the port in TIME_WAIT, and JAX needs it next.
    """
    connection.settimeout(IO_TIMEOUT_SECONDS)
    try:
        while connection.recv(4096):
            pass
    except OSError:
        pass
