"""Who is there, before JAX connects: each process says what it is and is told the rest.

JAX aborts a process that waits in vain for another one, and lets a second job talk to
the first one's service. So the processes first meet at the coordinator's port in plain
TCP, one line of JSON each way, and whoever does not fit hears why.
"""

import json
import socket
import time
from collections.abc import Mapping

from localsgd_jax.agreement import JobError, differences, listed

LONGEST = 1 << 16
PATIENCE = 5.0


def hold(bind: str, facts: Mapping, processes: int, timeout: float) -> None:
    """Process 0: waits for all others and tells them what differs.

    Args:
      bind: HOST:PORT at which to listen.
      facts: what must be the same; "job" tells jobs apart.
      processes: how many there are.
      timeout: seconds until those that are missing are given up.

    Raises:
      JobError: if the port is taken, a process does not come, or facts differ.
    """
    present: dict[int, socket.socket] = {}
    said = {0: dict(facts)}
    deadline = time.monotonic() + timeout
    with _listener(bind) as door:
        try:
            while len(said) < processes and (left := deadline - time.monotonic()) > 0:
                door.settimeout(left)
                try:
                    guest, _ = door.accept()
                except TimeoutError:
                    break
                _admit(guest, facts, processes, said, present)
            verdict = _verdict(said, processes, timeout)
            for guest in present.values():
                _send(guest, {"verdict": verdict})
            for guest in present.values():
                _drain(guest)
        finally:
            for guest in present.values():
                guest.close()
    if verdict:
        raise JobError(f"initialize(): {verdict}")


def attend(address: str, facts: Mapping, process: int, timeout: float) -> None:
    """Any other process: says what it is, and waits for what process 0 has found.

    Args:
      address: HOST:PORT of process 0.
      facts: what must be the same.
      process: own number.
      timeout: seconds until process 0 is given up.

    Raises:
      JobError: if process 0 is not there, is of another job, or facts differ.
    """
    with _connected(address, process, timeout) as line:
        line.settimeout(timeout + PATIENCE)
        _send(line, {"process": process, "facts": facts})
        try:
            answer = _receive(line)
        except OSError:
            answer = None
    if answer is None or "verdict" not in answer:
        raise JobError(
            f"initialize(): {address} does not answer process {process} as a process 0 "
            "that waits would: it belongs to a job that has begun without this "
            "process, to another program, or process 0 has failed"
        )
    if answer["verdict"]:
        raise JobError(f"initialize(): {answer['verdict']}")


def split(address: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT; IPv6 addresses stand in brackets."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(
            f"initialize(coordinator): it must be HOST:PORT, got {address!r}"
        )
    return host.strip("[]"), int(port)


def _connected(address: str, process: int, timeout: float) -> socket.socket:
    """Connects to process 0 as soon as it listens."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection(split(address), PATIENCE)
        except OSError as error:
            if time.monotonic() > deadline:
                raise JobError(
                    f"initialize(): process {process} found no process 0 at {address} "
                    f"within {timeout:g} s ({error}); it came too late, has another "
                    "address, or process 0 has failed"
                ) from None
            time.sleep(0.1)


def _listener(bind: str) -> socket.socket:
    """Listens at an address that nobody else has."""
    host, port = split(bind)
    everywhere = host in ("::", "0.0.0.0")
    both = everywhere and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        return socket.create_server(
            ("" if everywhere else host, port), family=family, dualstack_ipv6=both
        )
    except OSError as error:
        raise JobError(
            f"initialize(): process 0 cannot listen on {bind} ({error.strerror}); the "
            "port belongs to another job or program, or the address to another machine"
        ) from error


def _admit(
    guest: socket.socket,
    facts: Mapping,
    processes: int,
    said: dict[int, dict],
    present: dict[int, socket.socket],
) -> None:
    """Hears a process; sends it away at once if it is none of ours."""
    guest.settimeout(PATIENCE)
    try:
        heard = _receive(guest)
    except OSError:
        heard = None
    number, theirs = ((heard or {}).get(name) for name in ("process", "facts"))
    if type(number) is not int or not isinstance(theirs, dict):
        guest.close()
        return
    refusal = ""
    if theirs.get("job") != facts.get("job"):
        refusal = (
            f"this is job {facts.get('job')!r}, and process {number} belongs to job "
            f"{theirs.get('job')!r}"
        )
    elif number in said:
        refusal = f"process {number} of {processes} is here already"
    elif number not in range(processes):
        refusal = f"there are {processes} processes here, and no process {number}"
    if refusal:
        _send(guest, {"verdict": refusal})
        _drain(guest)
        guest.close()
        return
    said[number], present[number] = theirs, guest


def _verdict(said: Mapping[int, Mapping], processes: int, timeout: float) -> str:
    """Says what is wrong, or nothing."""
    lacking = sorted(set(range(processes)) - set(said))
    found = differences(said)
    if lacking:
        found.insert(
            0, f"{listed(lacking)} of {processes} did not come within {timeout:g} s"
        )
    return "; ".join(found)


def _send(line: socket.socket, message: Mapping) -> None:
    """Sends one line of JSON, to whoever is still there."""
    try:
        line.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass


def _receive(line: socket.socket) -> dict | None:
    """Receives one line of JSON; None if it is something else."""
    raw = b""
    while not raw.endswith(b"\n") and len(raw) < LONGEST:
        piece = line.recv(4096)
        if not piece:
            break
        raw += piece
        if raw[:1] != b"{":
            return None
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _drain(line: socket.socket) -> None:
    """Waits until the other side has closed, so that the port is free at once."""
    line.settimeout(PATIENCE)
    try:
        while line.recv(4096):
            pass
    except OSError:
        pass
