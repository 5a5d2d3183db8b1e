"""Fault-tolerant jobs with killed, stopped, terminated or slow processes."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from harness.launched_jobs import LaunchedJob
from harness.paths import PYTHONPATH, TESTS
from harness.process_jobs import Job, run
from harness.selection import in_full
from programs.fault_tolerant_worker import (
    BATCH,
    WORKERS,
    algorithm,
    data,
    evaluate,
    initial_params,
)

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import RunCheckpointer
from localsgd_jax.distributed.environment import parse_address
from localsgd_jax.fault_tolerance import EXIT_PREEMPTED, EXIT_TOO_FEW_PROCESSES
from localsgd_jax.fault_tolerance.membership import MAX_FAILED_ATTEMPTS

STEPS, PERIOD, HEARTBEAT, SYNC_TIMEOUT = 150, 5, 6, 15


@pytest.fixture(scope="module")
def fault_free_error():
    """The error at the end of a run without faults."""
    cluster = lsgd.simulate(algorithm(), WORKERS)
    state, _ = lsgd.train(
        cluster,
        cluster.init(initial_params()),
        lsgd.shuffled_batches(data(), workers=WORKERS, batch=BATCH),
        schedule=PERIOD,
        steps=STEPS,
        progress=False,
    )
    return float(evaluate(lsgd.consensus(state))["error"])


def assert_finished(history, fault_free_error, live_processes):
    """Checks the last step, the error and the longest time between two rounds."""
    assert history["step"][-1] == STEPS
    assert history["live_processes"][-1] == live_processes
    assert history["error"][-1] == pytest.approx(fault_free_error, rel=0.02)
    longest = np.diff(history["seconds"], prepend=0)[1:].max()
    assert longest < 2 * SYNC_TIMEOUT + 2 * HEARTBEAT


def run_with_fault(processes, kind, seed, **settings):
    """Sends a signal to a process other than 0 at a random time; returns the job."""
    rng = random.Random(seed)
    with Job(processes, steps=STEPS, pause=0.01, **settings) as job:
        job.wait_for_row(PERIOD * rng.randrange(1, 10))
        time.sleep(0.1 * rng.random())
        victim = rng.randrange(1, processes)
        job.send(victim, getattr(signal, kind))
        codes = job.end()
        return job, victim, codes


def last_row(job):
    """Returns the last row that process 0 has printed."""
    rows = [json.loads(line)["row"] for line in job.seen[0] if '"row"' in line]
    return rows[-1]


@pytest.mark.full
def test_failure_in_one_process_is_retried_by_all():
    found = run("membership_worker.py", 3)
    assert [row["fail_once"] for row in found] == [2] * 3
    assert [row["devices"] for row in found] == [[3, 3]] * 3
    assert [row["new_instance"] for row in found] == [3] * 3
    for row in found:
        assert row["attempts"] == MAX_FAILED_ATTEMPTS
        assert (
            f"run_atomically(): {MAX_FAILED_ATTEMPTS} attempts failed although no "
            "process has failed" in row["error"]
        )
        assert "process 0: TimeoutError: no result within 1 s" in row["error"]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("overlap", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "processes, kind, seed",
    [
        (3, "SIGKILL", 0),
        *[
            pytest.param(n, kind, seed, marks=pytest.mark.slow)
            for n in (3, 4)
            for kind in ("SIGKILL", "SIGSTOP")
            for seed in (1, 2)
        ],
    ],
)
def test_survivors_continue_after_failure(
    processes, kind, seed, overlap, fault_free_error
):
    job, victim, codes = run_with_fault(processes, kind, seed, overlap=overlap)
    survivors = set(range(processes)) - {victim}
    assert [codes[process] for process in survivors] == [0] * (processes - 1), (
        job.tail()
    )
    assert codes[victim] == (-signal.SIGKILL if kind == "SIGKILL" else None)
    assert_finished(job.history(), fault_free_error, processes - 1)
    message = (
        rf"train\(\): step \d+: lost process {victim} \(failed or heartbeat timeout\)"
    )
    assert sum(bool(re.search(message, line)) for line in job.seen[0]) == 1
    for process in survivors:
        history = job.history(process)
        assert history["step"] == job.history()["step"]
        assert np.isnan(np.array(history["compute_seconds"], float)[-1, victim])


@pytest.mark.full
@pytest.mark.timeout(200)
def test_sigterm_syncs_before_exit(tmp_path, fault_free_error):
    """SIGTERM to process 1, then to process 0; then a restart with two processes."""
    settings = {"directory": str(tmp_path), "pause": 0.01, "save_every": 1000}
    with Job(3, steps=10000, **settings) as job:
        job.wait_for_row(2 * PERIOD)
        job.send(1, signal.SIGTERM)
        while (row := job.wait_for_row(0))["live_processes"] == 3:
            pass
        job.send(0, signal.SIGTERM)
        assert job.end() == [EXIT_PREEMPTED] * 3, job.tail()
        messages = [line for line in job.seen[0] if "train():" in line]
        pattern = r"train\(\): step \d+: process (\d) leaves \(SIGTERM\)"
        left = [re.fullmatch(pattern, message)[1] for message in messages]
        assert left == ["1", "0"]
        last = last_row(job)
    with Job(2, steps=last["step"] + STEPS, **settings) as job:
        assert job.end() == [0, 0], job.tail()
        start = json.loads(next(line for line in job.seen[0] if '"from"' in line))
        assert start["from"] == last["step"] >= row["step"]
        error = job.history()["error"][-1]
        assert error == pytest.approx(fault_free_error, rel=0.02)


def launch(processes, **settings):
    """Runs a job under the launcher; returns its messages and lines."""
    options = "--elastic --restarts 1 --grace-period 3".split()
    program = "fault_tolerant_worker.py"
    with LaunchedJob(processes, program, settings, *options) as job:
        assert job.end(150) == 0, job.tail()
        return job.messages, "\n".join(job.lines)


def starts(messages):
    """Returns the steps at which the processes have started."""
    contents = [m.content for m in messages if m.process is not None]
    return [content["from"] for content in contents if "from" in content]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_launcher_restarts_after_failure_of_process_0(tmp_path):
    settings = {"steps": STEPS, "pause": 0.02, "directory": str(tmp_path)}
    messages, _ = launch(3, save_every=10, kill_after=[[0, 60]], **settings)
    first, second = sorted(starts(messages))[:3], sorted(starts(messages))[3:]
    assert first == [0] * 3 and second in ([40] * 3, [50] * 3)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "processes, faults, message",
    [
        in_full(2, [[0, "SIGSTOP"]], "process 0 has not responded for 3 s"),
        pytest.param(
            3,
            [[2, "SIGKILL"]],
            "CoordinationError: train(): process 2 failed (exit or heartbeat timeout)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            3,
            [[2, "SIGSTOP"]],
            "CoordinationError: train(): process 2 failed (exit or heartbeat timeout)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            3,
            [[0, "SIGSTOP"], [1, "SIGSTOP"]],
            "process 0 has not responded for 3 s",
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_failure_before_the_first_round_restarts_the_job(processes, faults, message):
    """The processes do not wait for the timeout of `initialize`."""
    messages, text = launch(processes, steps=PERIOD, heartbeat=3, start_faults=faults)
    assert message in text and "restart 1 of 1" in text
    assert "(timeout)" not in text
    finished = [m for m in messages if m.process is not None and "history" in m.content]
    assert len(finished) == processes


def attack(address, ended):
    """Holds idle, slow and malformed connections to the coordinator's port."""
    clients = []
    while not ended.wait(0.05):
        for text in (b"{", b"", b"GET / HTTP/1.1\r\n\r\n", b'{"failed": 1}\n'):
            with contextlib.suppress(OSError):
                clients.append(socket.create_connection(address, 5))
                clients[-1].sendall(text)
        for client in clients[-200:]:
            with contextlib.suppress(OSError):
                client.send(b" ")
        for client in clients[:-400]:
            client.close()
        clients = clients[-400:]
    for client in clients:
        client.close()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_job_starts_and_trains_while_its_port_is_attacked():
    ended = threading.Event()
    with LaunchedJob(3, "fault_tolerant_worker.py", {"steps": 50}) as job:
        while not (variables := job.environment(0)):
            time.sleep(0.05)
        address = parse_address(variables["LOCALSGD_COORDINATOR_ADDRESS"])
        attacker = threading.Thread(target=attack, args=(address, ended))
        attacker.start()
        try:
            assert job.end(150) == 0, job.tail()
        finally:
            ended.set()
            attacker.join()
    assert job.rows()[-1][1]["step"] == 50


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_stopped_process_0_is_restarted_from_the_last_checkpoint(tmp_path):
    settings = {"steps": 400, "pause": 0.01, "directory": str(tmp_path)}
    options = "--elastic --restarts 1 --grace-period 3".split()
    with LaunchedJob(3, "fault_tolerant_worker.py", settings, *options) as job:
        job.wait_for_row(10)
        os.kill(job.pids()[0], signal.SIGSTOP)
        assert job.end(150) == 0, job.tail()
        assert "process 0 has not responded" in "\n".join(job.lines)
        assert len(starts(job.messages)) == 6 and max(starts(job.messages)) > 0
        assert job.rows()[-1][1]["step"] == 400


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_resumed_run_equals_an_uninterrupted_one():
    command = [sys.executable, "-m", "stress.resume", "--kills", "3"]
    done = subprocess.run(
        command,
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 runs differ" in done.stdout


@pytest.mark.slow
def test_restart_latency_is_measured():
    command = [
        sys.executable,
        str(TESTS / "stress" / "restart_latency.py"),
        "--kills",
        "2",
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("steps lost") == 2 and "median" in done.stdout


@pytest.mark.full
@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"sync_steps": [30, 40]},
            r"train\(\): schedule: \[30, 60\] in process 0, \[40\] in process 1",
        ),
        (
            {"initial_values": [0.0, 1.0]},
            r"train\(\): start\.\S*w\S*: .* in process 0, .* in process 1",
        ),
    ],
)
def test_mismatch_raises_in_all_processes(settings, message):
    with Job(2, steps=10, **settings) as job:
        assert job.end() == [1, 1]
        for lines in job.seen:
            assert any(re.search(message, line) for line in lines), job.tail()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_resumed_process_exits():
    with Job(3, steps=600, pause=0.01) as job:
        job.wait_for_row(2 * PERIOD)
        job.send(2, signal.SIGSTOP)
        while job.wait_for_row(0)["live_processes"] == 3:
            pass
        job.send(2, signal.SIGCONT)
        assert job.end() == [0, 0, 1], job.tail()
        assert any("MembershipError" in line for line in job.seen[2])
        assert job.history()["live_processes"][-1] == 2


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_too_few_processes_save_and_exit(tmp_path):
    settings = {"pause": 0.01, "directory": str(tmp_path), "save_every": 10000}
    with Job(3, steps=10000, min_processes=3, **settings) as job:
        job.wait_for_row(2 * PERIOD)
        job.send(2, signal.SIGKILL)
        codes = job.end()
        expected = [EXIT_TOO_FEW_PROCESSES] * 2 + [-signal.SIGKILL]
        assert codes == expected, job.tail()
        row = last_row(job)
    cluster = lsgd.simulate(algorithm(), 1)
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        state, _ = checkpointer.restore(cluster.init(initial_params()))
    assert int(state.step) == row["step"]


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        in_full({"evaluate_every": 1}, id="within the run"),
        in_full({"evaluate_every": 1, "overlap": True}, id="overlap"),
        pytest.param({"steps": PERIOD}, id="after the last round"),
    ],
)
def test_callback_error_in_process_0_ends_all_processes(options):
    with Job(2, **({"steps": 100, "evaluate_fails": True} | options)) as job:
        assert job.end(timeout=60) == [1, 1], job.tail()
        assert job.seen[0][-1] == "OSError: no table"
        assert "process 0: OSError: no table" in job.seen[1][-1]


@pytest.mark.full
def test_wait_times_are_recorded():
    """Process 1 loads its batches slowly."""
    with Job(2, steps=5 * PERIOD, batch_seconds=[0.0, 0.1]) as job:
        assert job.end() == [0, 0], job.tail()
        history = {name: np.array(x) for name, x in job.history().items()}
    # The first round compiles, and the last one reads no further batch.
    middle = slice(1, -1)
    compute_seconds, wait_seconds = history["compute_seconds"], history["wait_seconds"]
    assert (history["straggler"][middle] == 1).all()
    assert (compute_seconds[middle, 1] >= PERIOD * 0.1).all()
    assert (wait_seconds[middle, 1] == 0).all()
    expected = compute_seconds.max(1, keepdims=True) - compute_seconds
    np.testing.assert_allclose(wait_seconds, expected, atol=1e-6)
    assert (wait_seconds[middle, 0] > PERIOD * 0.05).all()


@pytest.mark.full
def test_round_deadline_reduces_steps_of_slow_process():
    settings = {"period": 8, "batch_seconds": [0.0, 0.2], "round_deadline": 0.5}
    with Job(2, steps=4 * 8, **settings) as job:
        assert job.end() == [0, 0], job.tail()
        steps = np.array(job.history()["steps"])
    # The first round compiles, which takes an unknown time.
    later = steps[1:]
    assert ((1 <= later[:, 1]) & (later[:, 1] < later[:, 0])).all(), steps
