"""TCP rendezvous between threads instead of processes."""

import contextlib
import json
import socket
import threading
import time

import pytest
from harness.selection import in_full, keep

from localsgd_jax.distributed import mismatches, registration, rendezvous
from localsgd_jax.distributed.coordination import CoordinationError
from localsgd_jax.distributed.environment import parse_address
from localsgd_jax.distributed.launcher import coordinator
from localsgd_jax.distributed.launcher.coordinator import Reply
from localsgd_jax.distributed.launcher.ports import free_port

FINGERPRINT = {
    "job_id": "a",
    "num_processes": 3,
    "version": {"jax": "1.0"},
    "config": {"H": 4},
}


HEARTBEAT_TIMEOUT = 10.0


def run_rendezvous(
    *peers, fingerprint=FINGERPRINT, timeout=20.0, num_processes=3, last_after=0
):
    """Runs a rendezvous; returns the error of the server and of each peer, or "".

    Args:
      peers: process index and fingerprint of each peer.
      fingerprint: fingerprint of process 0.
      timeout: timeout of all.
      num_processes: number of processes.
      last_after: the last peer connects after that many peers have been rejected.
    """
    address = f"127.0.0.1:{free_port()}"
    errors = {}

    def call(name, function, *arguments):
        try:
            function(*arguments)
            errors[name] = ""
        except CoordinationError as error:
            errors[name] = str(error)

    limits = timeout, HEARTBEAT_TIMEOUT
    calls = [("server", rendezvous.serve, address, fingerprint, num_processes, *limits)]
    calls += [
        (f"peer {i}", rendezvous.join, address, own, process_id, *limits)
        for i, (process_id, own) in enumerate(peers, 1)
    ]
    threads = [threading.Thread(target=call, args=arguments) for arguments in calls]
    for thread in threads[:-1]:
        thread.start()
    deadline = time.monotonic() + timeout
    while len(errors) < last_after and time.monotonic() < deadline:
        time.sleep(0.01)
    threads[-1].start()
    for thread in threads:
        thread.join(60)
    return errors


def test_rendezvous_succeeds():
    errors = run_rendezvous((2, FINGERPRINT), (1, FINGERPRINT))
    assert set(errors.values()) == {""}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"config": {"H": 8}}, "config.H: 4 in processes 0, 1, 8 in process 2"),
        ({"version": {"jax": "2.0"}}, 'version.jax: "1.0" in processes 0, 1, "2.0" in'),
        ({"num_processes": 4}, "num_processes: 3 in processes 0, 1, 4 in process 2"),
        ({"config": {}}, "config.H: 4 in processes 0, 1, nothing in process 2"),
    ],
)
def test_mismatch_raises_in_all_processes(change, message):
    errors = run_rendezvous((1, FINGERPRINT), (2, FINGERPRINT | change))
    assert len(set(errors.values())) == 1
    assert message in errors["server"]


def test_missing_process_raises_in_all_processes():
    errors = run_rendezvous((1, FINGERPRINT), timeout=1.0)
    message = (
        "initialize(): process 2 of 3 did not reach the rendezvous within 1 s (timeout)"
    )
    assert errors == {"server": message, "peer 1": message}


def test_duplicate_or_foreign_process_is_rejected():
    foreign = (1, FINGERPRINT | {"job_id": "b"}), (7, FINGERPRINT)
    duplicates = (1, FINGERPRINT), (1, FINGERPRINT)
    errors = run_rendezvous(*foreign, *duplicates, (2, FINGERPRINT), last_after=3)
    assert errors.pop("server") == errors.pop("peer 5") == ""
    assert "process 1 belongs to job 'b', process 0 to job 'a'" in errors["peer 1"]
    assert "process_id must be less than 3, got 7" in errors["peer 2"]
    assert {errors["peer 3"], errors["peer 4"]} == {
        "",
        "initialize(): process 1 of 3 is already registered",
    }


def test_late_process_raises():
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(
        CoordinationError,
        match="process 1 could not connect to process 0 at 127.0.0.1",
    ):
        rendezvous.join(address, FINGERPRINT, 1, 0.5, HEARTBEAT_TIMEOUT)


@pytest.mark.parametrize("reply", [b"\0\0\x12\4\0\0", b"HTTP/1.1 400\r\n\r\n", b""])
def test_port_of_a_started_job_raises(reply):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def serve():
            connection, _ = other.accept()
            connection.recv(100)
            connection.sendall(reply)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(
            CoordinationError, match="for process 1: the job started without it"
        ):
            rendezvous.join(f"127.0.0.1:{port}", FINGERPRINT, 1, 5.0, HEARTBEAT_TIMEOUT)
        thread.join(10)


def test_port_in_use_raises():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(
            CoordinationError, match=r"cannot listen on .* \(Address already in"
        ):
            rendezvous.serve(address, FINGERPRINT, 2, 5.0, HEARTBEAT_TIMEOUT)


def test_server_listens_on_the_given_interface():
    with rendezvous._listen(f"127.0.0.1:{free_port()}") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


MALFORMED = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b'{"process_id": 1}\n',
    b'{"process_id": [], "fingerprint": {"job_id": "a"}}\n',
    b'{"process_id": true, "fingerprint": {"job_id": "a"}}\n',
    b'{"process_id": 1, "fingerprint": 1}\n',
    b'{"process_id": ' + b"[" * 30_000 + b"\n",
    b'{"failed": 1, "reason": "of another job", "job_id": "b"}\n',
    b'{"failed": true, "job_id": "a"}\n',
    b'{"' * 50_000,
    b"\0",
    b"",
]


class Server:
    """Rendezvous server in a thread."""

    def __init__(self, num_processes=3, timeout=20.0, heartbeat_timeout=10.0):
        """Starts the server and waits until it listens."""
        self.address, self.error = f"127.0.0.1:{free_port()}", None
        self.arguments = num_processes, timeout, heartbeat_timeout
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        self.connect().close()

    def run(self):
        """Serves; runs in the thread."""
        try:
            rendezvous.serve(self.address, FINGERPRINT, *self.arguments)
            self.error = ""
        except CoordinationError as error:
            self.error = str(error)

    def connect(self, text=b""):
        """Returns a connection over which a text was sent."""
        deadline = time.monotonic() + 20
        while True:
            try:
                connection = socket.create_connection(parse_address(self.address), 5)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
        try:
            connection.sendall(text)
        except OSError:
            pass  # Closed by the server before all of it was sent.
        return connection

    def join(self, process_id):
        """Registers a process in this thread."""
        rendezvous.join(self.address, FINGERPRINT, process_id, 20.0, 10.0)

    def end(self):
        """Waits for the server; returns its error."""
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self.error


def register(server, process_id):
    """Returns the connection of a registered process that never responds."""
    message = {"process_id": process_id, "fingerprint": FINGERPRINT}
    return server.connect(json.dumps(message).encode() + b"\n")


def test_malformed_message_is_ignored():
    server = Server(num_processes=2)
    for text in MALFORMED:
        server.connect(text).close()
    server.join(1)
    assert server.end() == ""


@contextlib.contextmanager
def slow_clients(server, count):
    """Connects clients that send a byte every 50 ms, and closes them at the end."""
    clients, stop = [server.connect(b"{") for _ in range(count)], threading.Event()

    def trickle():
        while not stop.wait(0.05):
            for client in clients:
                with contextlib.suppress(OSError):
                    client.send(b" ")

    sender = threading.Thread(target=trickle)
    sender.start()
    try:
        yield clients
    finally:
        stop.set()
        sender.join()
        for client in clients:
            client.close()


@pytest.mark.parametrize(
    "count", [8, pytest.param(300, marks=pytest.mark.slow)], ids=str
)
def test_processes_are_registered_among_slow_and_idle_clients(count):
    """More clients than `MAX_UNREGISTERED`, in the slow case."""
    server = Server()
    with contextlib.ExitStack() as stack, slow_clients(server, count):
        for text in MALFORMED + [b""] * count:
            stack.enter_context(server.connect(text))
        other = threading.Thread(target=server.join, args=(2,))
        other.start()
        for _ in range(count):
            stack.enter_context(server.connect())
        server.join(1)
        other.join(30)
        assert server.end() == ""


def test_slow_clients_do_not_extend_the_timeout():
    """One deadline for a client, and one for all."""
    server = Server(timeout=1.0)
    with slow_clients(server, 4):
        assert "processes 1, 2 of 3 did not reach the rendezvous" in server.end()


def test_slow_client_is_disconnected(monkeypatch):
    monkeypatch.setattr(registration, "IO_TIMEOUT_SECONDS", 0.3)
    server = Server(num_processes=2)
    with slow_clients(server, 1) as (client,):
        client.settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        assert server.error is None
    server.join(1)
    assert server.end() == ""


def test_exit_of_a_registered_process_raises_in_all_processes():
    server = Server()
    with register(server, 2) as other, other.makefile("rb") as replies:
        assert replies.readline() == registration.PING, "it is registered"
        register(server, 1).close()
        error = "process 1 closed its connection"
        reply = next(line for line in replies if line != registration.PING)
        assert json.loads(reply) == {"error": error}
    assert server.end() == f"initialize(): {error}"


@pytest.mark.parametrize("num_processes", keep([2, 3], [2]))
def test_stopped_process_raises_in_all_processes(num_processes, monkeypatch):
    """Whether or not all processes are registered."""
    monkeypatch.setattr(registration, "IO_TIMEOUT_SECONDS", 0.3)
    server = Server(num_processes, heartbeat_timeout=0.5)
    connection = register(server, 1)
    message = "initialize(): process 1 did not respond within 0.5 s (heartbeat timeout)"
    assert server.end() == message
    connection.close()


def test_stopped_process_0_raises_in_the_others():
    """The kernel accepts the connection of a process that is stopped."""
    with socket.create_server(("127.0.0.1", 0)) as stopped:
        address = f"127.0.0.1:{stopped.getsockname()[1]}"
        message = "process 0 at .* did not respond to process 1 within 0.2 s"
        with pytest.raises(CoordinationError, match=message):
            rendezvous.join(address, FINGERPRINT, 1, 20.0, 0.2)


def test_failure_reported_by_the_launcher_raises_in_all_processes():
    server = Server()
    reason = {"failed": 1, "reason": "exited with 137", "job_id": "a"}
    address = parse_address(server.address)
    error = "process 1 exited with 137 before it was connected"
    with register(server, 2) as other, other.makefile("rb") as replies:
        assert replies.readline() == registration.PING, "it is registered"
        assert coordinator.contact(address, reason) is Reply.ANSWERED
        reply = next(line for line in replies if line != registration.PING)
        assert json.loads(reply) == {"error": error}
    assert server.end() == f"initialize(): {error}"


@pytest.mark.parametrize(
    "config, name",
    [
        ({f"text {i}": "x" * 10_000 for i in range(8)} | {"H": 4}, "text 3"),
        in_full({f"name {i}": i for i in range(10_000)}, "name 3"),
    ],
    ids=["long values", "many names"],
)
def test_mismatch_of_large_configs_is_short(config, name):
    same, other = (
        FINGERPRINT | {"config": mismatches.to_json("initialize(config)", given)}
        for given in (config, config | {name: "another"})
    )
    errors = run_rendezvous((1, same), (2, same), fingerprint=same)
    assert set(errors.values()) == {""}
    found = set(run_rendezvous((1, same), (2, other), fingerprint=same).values())
    shown = name if len(config) < 100 else "all 10000"
    assert len(found) == 1 and f"config.{shown}: " in (text := found.pop())
    assert len(text) < 1000


def test_long_values_fit_into_the_reply():
    same, other = (FINGERPRINT | {"config": {"H": "x" * 30_000 + end}} for end in "ab")
    found = set(run_rendezvous((1, same), (2, other), fingerprint=same).values())
    assert len(found) == 1 and "sha256" in found.pop()
