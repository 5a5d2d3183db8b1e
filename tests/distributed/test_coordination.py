"""`Coordinator` on JAX's coordination service, with threads instead of processes."""

import threading
import time

import jax
import pytest
from jax._src.lib import _jax

from localsgd_jax.distributed import coordination
from localsgd_jax.distributed.coordination import CoordinationError, Coordinator
from localsgd_jax.distributed.launcher.ports import free_port

NUM_PROCESSES = 3


class Job:
    """Coordination service with one client for each of several threads."""

    def __init__(self, recoverable):
        """Starts the service and connects the clients."""
        address = f"127.0.0.1:{free_port()}"
        self.service = _jax.get_distributed_runtime_service(
            address, NUM_PROCESSES, shutdown_timeout=20, recoverable=recoverable
        )
        self.clients = [
            _jax.get_distributed_runtime_client(address, process, init_timeout=20)
            for process in range(NUM_PROCESSES)
        ]
        self.local = threading.local()
        self.run(lambda process: self.clients[process].connect())

    def run(self, call, processes=range(NUM_PROCESSES)):
        """Calls a function in a thread for each process; returns results or errors."""
        results = {}

        def target(process):
            self.local.process = process
            try:
                results[process] = call(process)
            except Exception as error:
                results[process] = f"{type(error).__name__}: {error}"

        threads = [threading.Thread(target=target, args=(i,)) for i in processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results

    def close(self):
        self.run(lambda process: self.clients[process].shutdown())
        self.service.shutdown()


@pytest.fixture(params=[False, True], ids=["", "recoverable"])
def job(request, monkeypatch):
    job = Job(request.param)
    # Every thread has its own call counters, as every process has.
    states = [coordination.JobState() for _ in range(NUM_PROCESSES)]
    for state in states:
        state.recoverable = request.param

    class ThreadState:
        def __getattr__(self, name):
            return getattr(states[job.local.process], name)

    monkeypatch.setattr(coordination, "job_state", ThreadState())
    monkeypatch.setattr(
        coordination, "coordination_client", lambda: job.clients[job.local.process]
    )
    monkeypatch.setattr(jax, "process_index", lambda: job.local.process)
    monkeypatch.setattr(jax, "process_count", lambda: NUM_PROCESSES)
    job.states = states
    yield job
    job.close()


def test_all_gather_returns_the_same_messages_everywhere(job):
    def exchange(process):
        coordinator = Coordinator("train(batches)", range(NUM_PROCESSES))
        rounds = ["a", "c", None, {"b": process}]
        return [
            coordinator.all_gather(None if process == 1 else message)
            for message in rounds
        ]

    found = job.run(exchange)
    assert found[0] == found[1] == found[2]
    assert found[0] == [
        {0: "a", 2: "a"},
        {0: "c", 2: "c"},
        {},
        {0: {"b": 0}, 2: {"b": 2}},
    ]


def test_messages_are_deleted_after_the_next_barrier(job):
    def exchange(process):
        coordinator = Coordinator("train(batches)", range(NUM_PROCESSES))
        for i in range(4):
            coordinator.all_gather(i)
        coordinator.all_gather()

    job.run(exchange)
    assert job.clients[0].key_value_dir_get("localsgd/") == []


def test_coordinators_of_one_call_do_not_share_messages(job):
    def exchange(process):
        return [
            Coordinator("init(params)", range(NUM_PROCESSES)).all_gather(i)
            for i in range(3)
        ]

    expected = [dict.fromkeys(range(NUM_PROCESSES), i) for i in range(3)]
    assert job.run(exchange) == dict.fromkeys(range(NUM_PROCESSES), expected)


def assert_equal(fingerprint):
    coordination.assert_equal_across_processes(
        "train()", fingerprint, range(NUM_PROCESSES)
    )
    return "equal"


def test_equal_fingerprints_pass(job):
    found = job.run(lambda process: assert_equal({"H": (4, 8)}))
    assert set(found.values()) == {"equal"}


def test_mismatch_raises_the_same_error_everywhere(job):
    found = job.run(lambda process: assert_equal({"H": 4 + process // 2}))
    message = "CoordinationError: train(): H: 4 in processes 0, 1, 5 in process 2"
    assert found == dict.fromkeys(range(NUM_PROCESSES), message)


def test_group_may_be_a_subset(job):
    def check(process):
        coordination.assert_equal_across_processes("train()", {"p": 0}, [0, 2])
        return "equal"

    assert job.run(check, [0, 2]) == {0: "equal", 2: "equal"}


def test_missing_process_is_named_and_learns_of_it(job):
    for state in job.states:
        state.timeout = 1
    began = time.monotonic()
    found = job.run(lambda process: assert_equal({"H": process}), [0, 2])
    assert time.monotonic() - began < 20
    missing = "train(): process 1 did not reach the barrier within 1 s (timeout)"
    message = f"CoordinationError: {missing}; H: 0 in process 0, 2 in process 2"
    assert found == {0: message, 2: message}
    late = job.run(lambda process: assert_equal({"H": process}), [1])
    assert late[1].startswith(f"CoordinationError: {missing}")


def test_all_gather_names_the_missing_process(job):
    for state in job.states:
        state.timeout = 1

    def exchange(process):
        return Coordinator("train(batches)", range(NUM_PROCESSES)).all_gather()

    found = job.run(exchange, [1])
    assert found[1] == (
        "CoordinationError: train(batches): processes 0, 2 did not reach the barrier "
        "within 1 s (timeout)"
    )


@pytest.mark.parametrize("job", [True], indirect=True, ids=["recoverable"])
def test_failed_process_is_named_before_the_timeout(job):
    job.run(lambda process: job.clients[process].shutdown(), [1])
    found = job.run(lambda process: assert_equal({"H": process}), [0, 2])
    failed = "train(): process 1 failed (exit or heartbeat timeout)"
    message = f"CoordinationError: {failed}; H: 0 in process 0, 2 in process 2"
    assert found == {0: message, 2: message}
    exchange = job.run(lambda i: Coordinator("init()", [0, 1, 2]).all_gather(i), [0, 2])
    assert set(exchange.values()) == {
        "CoordinationError: init(): process 1 failed (exit or heartbeat timeout)"
    }


def test_broadcast_computes_in_the_lowest_process_only(job, monkeypatch):
    monkeypatch.setattr(coordination, "POLL_INTERVAL_SECONDS", 0.1)
    calls = []

    def compute():
        time.sleep(0.3)  # Longer than the poll interval.
        calls.append(jax.process_index())
        return {"loss": 0.5}

    found = job.run(
        lambda process: coordination.broadcast_from_first(
            "train(evaluate)", compute, [0, 1, 2]
        )
    )
    assert found == dict.fromkeys(range(NUM_PROCESSES), {"loss": 0.5})
    assert calls == [0]


@pytest.mark.parametrize("value", [None, object()], ids=["raises", "not json"])
def test_broadcast_error_reaches_all_processes(job, value):
    def compute():
        if value is None:
            raise OSError("no space left")
        return value

    found = job.run(
        lambda process: coordination.broadcast_from_first(
            "train(evaluate)", compute, [0, 1, 2]
        )
    )
    kind = "OSError: no space left" if value is None else "TypeError: Object of type"
    assert found[0].startswith(kind)
    for process in (1, 2):
        expected = f"CoordinationError: train(evaluate): process 0 raised {kind}"
        assert found[process].startswith(expected)


def test_single_process_does_not_communicate():
    coordinator = Coordinator("train()", [0])
    assert coordinator.all_gather() == {} and coordinator.all_gather(1) == {0: 1}
    coordinator.assert_equal({"H": 4})
    assert coordinator.broadcast(lambda: 3) == 3
    # A group of a compile-only target, whose processes do not run.
    coordination.assert_equal_across_processes("train()", {"H": 4}, [0, 1])
    with pytest.raises(CoordinationError):
        raise CoordinationError
