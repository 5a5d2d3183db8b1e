"""How processes find each other and what they compare, without starting any."""

import inspect
import json
import os
import pathlib
import re
import socket
import threading
import time
import types

import jax
import numpy as np
import pytest

import localsgd_jax as lsgd
from localsgd_jax import agreement, distributed, rollcall
from localsgd_jax.agreement import JobError
from localsgd_jax.launch.job import free_port

FACTS = {"job": "a", "processes": 3, "version": {"jax": "1.0"}, "config": {"H": 4}}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in os.environ:
        if name.startswith(("LOCALSGD_CO", "LOCALSGD_PR", "SLURM_", "OMPI_")):
            monkeypatch.delenv(name)


def meet(*guests, facts=FACTS, timeout=20.0, processes=3, after=0):
    """Calls the roll; returns what each process heard: "" or the error.

    The last guest comes when so many have been sent away.
    """
    address = f"127.0.0.1:{free_port()}"
    heard = {}

    def note(name, call, *arguments):
        try:
            call(*arguments)
            heard[name] = ""
        except JobError as error:
            heard[name] = str(error)

    calls = [("host", rollcall.hold, address, facts, processes, timeout)]
    calls += [
        (f"guest {i}", rollcall.attend, address, said, number, timeout)
        for i, (number, said) in enumerate(guests, 1)
    ]
    threads = [threading.Thread(target=note, args=call) for call in calls]
    for thread in threads[:-1]:
        thread.start()
    until = time.monotonic() + timeout
    while len(heard) < after and time.monotonic() < until:
        time.sleep(0.01)
    threads[-1].start()
    for thread in threads:
        thread.join(60)
    return heard


def test_processes_that_fit_go_on():
    assert set(meet((2, FACTS), (1, FACTS)).values()) == {""}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"config": {"H": 8}}, "config.H: 4 in processes 0, 1, 8 in process 2"),
        ({"version": {"jax": "2.0"}}, 'version.jax: "1.0" in processes 0, 1, "2.0" in'),
        ({"processes": 4}, "processes: 3 in processes 0, 1, 4 in process 2"),
        ({"config": {}}, "config.H: 4 in processes 0, 1, nothing in process 2"),
    ],
)
def test_everybody_hears_what_differs(change, named):
    heard = meet((1, FACTS), (2, FACTS | change))
    assert len(set(heard.values())) == 1
    assert named in heard["host"]


def test_everybody_hears_who_did_not_come():
    heard = meet((1, FACTS), timeout=1.0)
    named = "initialize(): process 2 of 3 did not come within 1 s"
    assert heard == {"host": named, "guest 1": named}


def test_who_comes_twice_or_from_another_job_is_sent_away():
    strangers = (1, FACTS | {"job": "b"}), (7, FACTS)
    heard = meet(*strangers, (1, FACTS), (1, FACTS), (2, FACTS), after=3)
    assert heard.pop("host") == heard.pop("guest 5") == ""
    assert "this is job 'a', and process 1 belongs to job 'b'" in heard["guest 1"]
    assert "there are 3 processes here, and no process 7" in heard["guest 2"]
    twins = {heard["guest 3"], heard["guest 4"]}
    assert twins == {"", "initialize(): process 1 of 3 is here already"}


def test_who_comes_too_late_is_told_so():
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(JobError, match="process 1 found no process 0 at 127.0.0.1"):
        rollcall.attend(address, FACTS, 1, 0.5)


@pytest.mark.parametrize("answer", [b"\0\0\x12\4\0\0", b"HTTP/1.1 400\r\n\r\n", b""])
def test_a_port_of_a_job_that_has_begun_is_told_apart(answer):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def serve():
            line, _ = other.accept()
            line.recv(100)
            line.sendall(answer)
            line.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(JobError, match="a job that has begun without this process"):
            rollcall.attend(f"127.0.0.1:{port}", FACTS, 1, 5.0)
        thread.join(10)


def test_a_port_that_is_taken_is_told_at_once():
    with socket.create_server(("127.0.0.1", 0)) as other:
        bind = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(JobError, match=r"cannot listen on .* \(Address already in"):
            rollcall.hold(bind, FACTS, 2, 5.0)


def test_a_visitor_that_talks_nonsense_disturbs_nobody(monkeypatch):
    monkeypatch.setattr(rollcall, "PATIENCE", 0.5)
    address = f"127.0.0.1:{free_port()}"
    errors = []
    host = threading.Thread(target=rollcall.hold, args=(address, FACTS, 2, 20.0))
    host.start()
    nonsense = [
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"process": 1}\n',
        b'{"process": [], "facts": {"job": "a"}}\n',
        b'{"process": true, "facts": {"job": "a"}}\n',
        b'{"process": 1, "facts": 1}\n',
        b'{"process": ' + b"[" * 30_000 + b"\n",
        b'{"' * 50_000,
        b"",
    ]
    for text in nonsense:
        while True:
            assert host.is_alive()
            try:
                line = socket.create_connection(rollcall.split(address), 5)
                break
            except ConnectionRefusedError:
                continue
        try:
            line.sendall(text)
        except OSError as error:
            errors.append(error)  # Sent away before it had said all.
        line.close()
    rollcall.attend(address, FACTS, 1, 20.0)
    host.join(20)
    assert not host.is_alive() and len(errors) <= 1


def test_large_configs_are_told_apart_in_few_words():
    large = {f"text {i}": "x" * 10_000 for i in range(8)} | {"H": 4}
    names = {f"name {i}": i for i in range(10_000)}
    for config, name in ((large, "text 3"), (names, "name 3")):
        same, other = (
            FACTS | {"config": agreement.plain("initialize(config)", given)}
            for given in (config, config | {name: "another"})
        )
        assert set(meet((1, same), (2, same), facts=same).values()) == {""}
        said = set(meet((1, same), (2, other), facts=same).values())
        named = name if config is large else "all 10000"
        assert len(said) == 1 and f"config.{named}: " in (text := said.pop())
        assert len(text) < 1000


def test_long_values_do_not_burst_the_answer():
    same, other = (FACTS | {"config": {"H": "x" * 30_000 + end}} for end in "ab")
    said = set(meet((1, same), (2, other), facts=same).values())
    assert len(said) == 1 and "sha256" in said.pop()


def test_the_port_is_open_to_this_machine_alone_unless_an_address_is_given():
    place = distributed.Place("127.0.0.1:1234", 2, 0)
    assert distributed._door(place) == "127.0.0.1:1234"
    assert distributed._door(place._replace(coordinator="localhost:99")).startswith(
        "127"
    )
    assert distributed._door(place._replace(coordinator="[::1]:99")) == "[::1]:99"
    assert distributed._door(place._replace(coordinator="10.0.0.7:99")) == "[::]:99"
    with rollcall._listener(f"127.0.0.1:{free_port()}") as door:
        assert door.getsockname()[0] == "127.0.0.1"


def test_alone_nothing_happens():
    assert lsgd.initialize() == 1
    assert lsgd.initialize("localhost:1234", 1, 0) == 1
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("localhost:1", 2, None), "all three or none are needed"),
        (("localhost", 2, 0), "must be HOST:PORT, got 'localhost'"),
        (("localhost:70000", 2, 0), "must be HOST:PORT"),
        (("localhost:²", 2, 0), "must be HOST:PORT"),
        (("localhost:1", 2, 2), "processes count from 0 to 1, got 2"),
        (("localhost:1", 0, 0), "the number of processes must be at least 1, got 0"),
    ],
)
def test_impossible_places_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lsgd.initialize(*arguments)


@pytest.mark.parametrize("place", [(), ("localhost:1", 1, 0), ("localhost:1", 2, 0)])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"heartbeat": 0}, "heartbeat must be at least 1, got 0"),
        ({"heartbeat": 1.5}, "heartbeat must be an int, got 1.5"),
        ({"timeout": 0}, "must be positive and at most 1e[+]06 s, got 0"),
        ({"timeout": float("nan")}, "must be positive and at most"),
        ({"timeout": float("inf")}, "must be positive and at most"),
        ({"timeout": "9"}, "must be a number, got '9'"),
        ({"config": [("H", 4)]}, r"must be a mapping, got \[\('H', 4\)\]"),
        ({"config": {"H": np.ones((9, 9))}}, r"got array\(.*\) for 'H'"),
        ({"config": {"a": {"b": {1}}}}, r"got \{'b': \{1\}\} for 'a'"),
        ({"config": {(1, 2): 1}}, r"got 1 for \(1, 2\)"),
    ],
)
def test_impossible_settings_are_refused_also_alone(place, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        lsgd.initialize(*place, **arguments)
    (name,) = arguments
    assert str(caught.value).startswith(f"initialize({name}): ")
    assert "\n" not in str(caught.value)


def test_configs_are_compared_as_json_gives_them_back():
    here, there = {"H": (4, 8), 1: {2: 3}}, {"1": {"2": 3}, "H": [4, 8]}
    plain = [agreement.plain("initialize(config)", given) for given in (here, there)]
    assert plain == [there, there]


@pytest.mark.parametrize("name", ["COORDINATOR", "PROCESSES", "PROCESS"])
def test_a_single_variable_is_refused(monkeypatch, name):
    monkeypatch.setenv(f"LOCALSGD_{name}", "1")
    with pytest.raises(ValueError, match="all of LOCALSGD_COORDINATOR, .* not set"):
        lsgd.initialize()


def test_nobody_waits_for_a_process_that_has_started_jax_before():
    jax.devices()
    with pytest.raises(RuntimeError, match="must come before all that makes JAX look"):
        lsgd.initialize("localhost:1234", 2, 1)


def test_the_environment_of_the_launcher(monkeypatch):
    monkeypatch.setenv("LOCALSGD_COORDINATOR", "10.0.0.7:1234")
    with pytest.raises(ValueError, match="'LOCALSGD_PROCESSES' is not set"):
        lsgd.initialize()
    monkeypatch.setenv("LOCALSGD_PROCESSES", "4")
    for number in ("x", "²"):
        monkeypatch.setenv("LOCALSGD_PROCESS", number)
        with pytest.raises(ValueError, match="LOCALSGD_PROCESS must be a whole number"):
            lsgd.initialize()
    monkeypatch.setenv("LOCALSGD_PROCESS", "3")
    place = distributed._place(None, None, None, 1)
    assert place == distributed.Place("10.0.0.7:1234", 4, 3)


SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[003-005,9]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_VERSION": "4.1.6",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.2:45911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


@pytest.mark.parametrize(
    "variables, host, processes, process, devices",
    [
        (SLURM, "node003", 8, 5, [1]),
        (OPEN_MPI, "10.0.0.2", 4, 2, [0]),
    ],
    ids=["slurm", "open mpi"],
)
def test_clusters_that_jax_knows(
    monkeypatch, variables, host, processes, process, devices
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place = distributed._place(None, None, None, 1)
    assert place.coordinator.rpartition(":")[0] == host
    assert place[1:] == (processes, process, devices)
    if variables is SLURM:
        assert distributed._facts(place, {})["job"] == "4242.0"


def device(number, process, **more):
    return types.SimpleNamespace(
        id=number, process_index=process, platform="cpu", device_kind="cpu", **more
    )


def owners(mesh):
    return np.vectorize(lambda d: d.process_index)(mesh.devices).tolist()


@pytest.fixture
def no_checks(monkeypatch):
    """Lets meshes be made of devices that are not there."""
    from localsgd_jax import meshes

    monkeypatch.setattr(
        meshes,
        "Mesh",
        lambda grid, names, axis_types: types.SimpleNamespace(
            devices=grid, axis_names=names
        ),
    )


def test_workers_go_across_processes(no_checks):
    eight = [device(i, i // 4) for i in range(8)]
    mesh = lsgd.worker_mesh(devices=eight[::-1])
    assert owners(mesh) == [0] * 4 + [1] * 4
    mesh = lsgd.worker_mesh(within={"model": 2}, devices=eight)
    assert mesh.axis_names == ("worker", "model")
    assert owners(mesh) == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert owners(lsgd.worker_mesh(6, devices=eight)) == [0] * 3 + [1] * 3
    assert owners(lsgd.worker_mesh(2, within={"m": 2}, devices=eight)) == [
        [0, 0],
        [1, 1],
    ]
    # Workers larger than a process are made of whole processes.
    mesh = lsgd.worker_mesh(within={"model": 8}, devices=eight)
    assert owners(mesh) == [[0] * 4 + [1] * 4]


def test_workers_go_across_slices(no_checks):
    pod = [device(i, i // 2, slice_index=i // 4) for i in range(8)]
    mesh = lsgd.worker_mesh(within={"model": 4}, devices=pod)
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices).tolist()
    assert slices == [[0] * 4, [1] * 4]
    mesh = lsgd.worker_mesh(2, devices=pod)
    assert [d.slice_index for d in mesh.devices.flat] == [0, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"workers": 3}, "workers must be a multiple of the 2 processes"),
        ({"within": {"model": 3}}, "workers of 3 devices must divide the 8 devices"),
        ({"workers": 1, "within": {"model": 8}}, "workers of 8 devices must divide"),
        ({"within": {"model": 0}}, "the size of an axis must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_on_a_mesh_is_refused(no_checks, arguments, message):
    eight = [device(i, i // 4) for i in range(8)]
    with pytest.raises(ValueError, match=message):
        lsgd.worker_mesh(**arguments, devices=eight)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"devices": []}, "(devices): at least one is needed, got none"),
        ({"within": {"worker": 1}}, "(within): 'worker' is the worker axis already"),
        ({"within": {"": 1}}, "(within): an axis must have a name, got ''"),
        ({"within": {3: 1}}, "(within): an axis must have a name, got 3"),
        ({"within": ["model"]}, "(within): it must map names of axes to sizes, got"),
        ({"within": [("model", 1)]}, "(within): it must map names of axes to sizes"),
        ({"axis": ""}, "(axis): an axis must have a name, got ''"),
        ({"axis": ("a", "b")}, "(axis): an axis must have a name, got ('a', 'b')"),
    ],
)
def test_meshes_that_cannot_be_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        lsgd.worker_mesh(**arguments)
    assert str(caught.value).startswith("worker_mesh" + message)
    assert "\n" not in str(caught.value)


def test_a_device_belongs_to_one_worker():
    named = r"worker_mesh\(devices\): each may come once, got .* again"
    with pytest.raises(ValueError, match=named):
        lsgd.worker_mesh(devices=[*jax.devices(), jax.devices()[0]])


def test_a_mesh_of_the_devices_here_trains():
    mesh = lsgd.worker_mesh(4)
    assert dict(mesh.shape) == {"worker": 4}
    assert dict(lsgd.worker_mesh(within={"model": 2}).shape) == {
        "worker": 4,
        "model": 2,
    }
    assert lsgd.worker_mesh(12).size == 6


def test_differences_are_few_and_nested():
    many = {i: {"at": {f"leaf{j}": i for j in range(9)}} for i in range(2)}
    found = agreement.differences(many)
    assert found[0] == "at.leaf0: 0 in process 0, 1 in process 1"
    assert len(found) == 6 and found[-1] == "and 4 more"
    assert agreement.differences({0: {"x": [1]}, 1: json.loads('{"x": [1]}')}) == []


@pytest.fixture
def docs():
    path = pathlib.Path(__file__).parent.parent / "docs" / "processes.md"
    return path.read_text()


def test_the_manifest_of_the_docs_sets_what_is_read(monkeypatch, docs):
    named = re.findall(r"name: (LOCALSGD_\w+)(?:, value: \"(.*?)\")?", docs)
    assert len(named) == 3
    for name, value in named:
        monkeypatch.setenv(name, value or "3")
    place = distributed._place(None, None, None, 1)
    assert place == distributed.Place("train-0.localsgd:29500", 4, 3)


def test_the_docs_name_what_jax_reads(docs):
    for name in SLURM.keys() - {"SLURM_STEP_ID"}:
        assert name in docs
    for name in ("heartbeat", "timeout", "bind", "config"):
        assert f"`{name}" in docs or f"{name}=" in docs
        assert name in inspect.signature(lsgd.initialize).parameters
