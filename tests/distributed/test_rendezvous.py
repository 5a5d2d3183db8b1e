"""TCP rendezvous between threads instead of processes."""

import socket
import threading
import time

import pytest
from harness.selection import in_full

from localsgd_jax.distributed import mismatches, rendezvous
from localsgd_jax.distributed.coordination import CoordinationError
from localsgd_jax.distributed.environment import parse_address
from localsgd_jax.distributed.launcher.ports import free_port

FINGERPRINT = {
    "job_id": "a",
    "num_processes": 3,
    "version": {"jax": "1.0"},
    "config": {"H": 4},
}


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

    calls = [("server", rendezvous.serve, address, fingerprint, num_processes, timeout)]
    calls += [
        (f"peer {i}", rendezvous.join, address, own, process_id, timeout)
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
        rendezvous.join(address, FINGERPRINT, 1, 0.5)


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
            rendezvous.join(f"127.0.0.1:{port}", FINGERPRINT, 1, 5.0)
        thread.join(10)


def test_port_in_use_raises():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(
            CoordinationError, match=r"cannot listen on .* \(Address already in"
        ):
            rendezvous.serve(address, FINGERPRINT, 2, 5.0)


def test_server_listens_on_the_given_interface():
    with rendezvous._listen(f"127.0.0.1:{free_port()}") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_malformed_message_is_ignored(monkeypatch):
    monkeypatch.setattr(rendezvous, "IO_TIMEOUT_SECONDS", 0.5)
    address = f"127.0.0.1:{free_port()}"
    errors = []
    server = threading.Thread(
        target=rendezvous.serve, args=(address, FINGERPRINT, 2, 20.0)
    )
    server.start()
    malformed = [
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"process_id": 1}\n',
        b'{"process_id": [], "fingerprint": {"job_id": "a"}}\n',
        b'{"process_id": true, "fingerprint": {"job_id": "a"}}\n',
        b'{"process_id": 1, "fingerprint": 1}\n',
        b'{"process_id": ' + b"[" * 30_000 + b"\n",
        b'{"' * 50_000,
        b"",
    ]
    for text in malformed:
        while True:
            assert server.is_alive()
            try:
                connection = socket.create_connection(parse_address(address), 5)
                break
            except ConnectionRefusedError:
                continue
        try:
            connection.sendall(text)
        except OSError as error:
            errors.append(error)  # Rejected before all of it was sent.
        connection.close()
    rendezvous.join(address, FINGERPRINT, 1, 20.0)
    server.join(20)
    assert not server.is_alive() and len(errors) <= 1


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
