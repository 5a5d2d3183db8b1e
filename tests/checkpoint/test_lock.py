"""Two jobs on one directory, and locks of processes that have ended."""

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from harness.checkpoint_run import K, initial_state, make_algorithm
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, RunCheckpointer, lock

OWNER = """
import fcntl, json, os, signal, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
json.dump({"pid": os.getpid(), "host": "far", "job_id": "7", "since": "noon"}, file)
file.flush()
print(flush=True)
signal.pause()
"""


@pytest.fixture
def cluster():
    return lsgd.simulate(make_algorithm(), K)


def test_directory_of_another_process_raises_until_it_is_killed(tmp_path, cluster):
    command = [sys.executable, "-c", OWNER, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        owner.stdout.readline()
        message = f"is in use by pid {owner.pid} on host far, job 7, since noon; end it"
        with pytest.raises(CheckpointError, match=message):
            RunCheckpointer(tmp_path, cluster)
        owner.kill()
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        checkpointer.save(cluster.init(initial_state()))
    assert sorted(os.listdir(tmp_path)) == ["0"]


def test_second_checkpointer_of_a_process_raises(tmp_path, cluster):
    state = cluster.init(initial_state())
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        with pytest.raises(CheckpointError, match=f"in use by pid {os.getpid()} on"):
            RunCheckpointer(tmp_path, cluster)
        checkpointer.save(state)
        assert checkpointer.latest_step() == 0
        with RunCheckpointer(tmp_path, cluster, read_only=True) as reader:
            assert reader.latest_step() == 0
            assert int(reader.restore(state)[0].step) == 0
            with pytest.raises(CheckpointError, match=r"save\(state\): .*read only"):
                reader.save(state)


def test_read_only_directory_must_exist(tmp_path, cluster):
    with pytest.raises(CheckpointError, match="directory must exist, got .*/run"):
        RunCheckpointer(tmp_path / "run", cluster, read_only=True)


def test_job_cannot_save_into_a_directory_of_another(tmp_path, cluster):
    """On a file system that does not enforce flock between hosts."""
    state = cluster.init(initial_state())
    checkpointer = RunCheckpointer(tmp_path, cluster)
    other = {"pid": 5, "host": "other", "job_id": "", "since": "noon", "token": "1"}
    (tmp_path / ".lock").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="in use by pid 5 on host other, since"):
        checkpointer.save(state)
    checkpointer.close()
    assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("replace", [False, in_full(True)])
def test_removed_or_replaced_directory_raises(tmp_path, cluster, replace):
    state, directory = cluster.init(initial_state()), tmp_path / "run"
    checkpointer = RunCheckpointer(directory, cluster)
    shutil.rmtree(directory)
    if replace:
        directory.write_text("")
    with pytest.raises(CheckpointError, match="/run was removed or replaced while"):
        checkpointer.save(state)
    checkpointer.close()


@pytest.mark.parametrize("running", [True, False])
def test_file_system_without_flock(tmp_path, cluster, monkeypatch, running):
    """The process id decides on the same host."""

    def unsupported(*arguments):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    pid = os.getpid()
    if not running:
        ended = subprocess.Popen(["true"])
        ended.wait()
        pid = ended.pid
    owner = {"pid": pid, "host": socket.gethostname(), "since": "noon", "token": "1"}
    (tmp_path / ".lock").write_text(json.dumps(owner))
    if running:
        with pytest.raises(CheckpointError, match=f"in use by pid {pid} on host"):
            RunCheckpointer(tmp_path, cluster)
    else:
        with RunCheckpointer(tmp_path, cluster) as checkpointer:
            checkpointer.save(cluster.init(initial_state()))


@pytest.mark.filterwarnings("ignore")  # JAX warns of threads.
def test_forked_process_does_not_keep_the_lock(tmp_path):
    """A child that outlives its parent has the open file, and so the lock."""
    held = lock.DirectoryLock(str(tmp_path))
    child = os.fork()
    if child == 0:
        closed = held._file.closed
        os._exit(0 if closed else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert held.problem() is None
    held.release()
    assert not list(tmp_path.iterdir())
