"""Full disks, read-only directories and wall clocks that jump."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from harness.paths import PROGRAMS, PYTHONPATH
from programs import checkpoint_on_full_disk

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError

MOUNT = "mount -t tmpfs -o {} none {}"


def mounted(options, directory, *command):
    """Runs a command in a mount namespace with a tmpfs at a directory."""
    line = f'{MOUNT.format(options, directory)} && exec "$@"'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", line, "sh", *map(str, command)],
        cwd=PROGRAMS,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=120,
    )


def can_mount(tmp_path_factory):
    if not shutil.which("unshare"):
        return False
    directory = tmp_path_factory.mktemp("probe")
    return mounted("size=4k", directory, "true").returncode == 0


@pytest.fixture
def disk(tmp_path_factory):
    if not can_mount(tmp_path_factory):
        pytest.skip("mounting a small disk needs root and unshare (util-linux)")
    return tmp_path_factory.mktemp("disk")


def test_full_disk_keeps_complete_checkpoints(disk):
    command = [sys.executable, "checkpoint_on_full_disk.py", disk / "run", "400"]
    ended = mounted("size=3m", disk, *command)
    row = json.loads(ended.stdout)
    assert f"could not be written into {disk / 'run'} (No space left on" in row["error"]
    assert "complete checkpoints are not affected" in row["error"]
    assert row["restored"] == row["complete"] and 4 <= row["restored"] < 400


@pytest.mark.full
def test_read_only_disk_raises_at_once(disk):
    ended = mounted(
        "ro", disk, sys.executable, "checkpoint_on_full_disk.py", disk / "run", "4"
    )
    row = json.loads(ended.stdout)
    assert row["error"] == (
        f"RunCheckpointer(directory): {disk / 'run'} cannot be created or written "
        "(Read-only file system)"
    )


@pytest.mark.full
def test_command_line_prints_one_line(disk, tmp_path):
    (tmp_path / "data.svm").write_text("1 1:1\n-1 1:-1\n" * 8)
    train = f"train --data {tmp_path / 'data.svm'} --workers 2 --steps 64 --period 1"
    command = [sys.executable, "-m", "localsgd_jax", *train.split(), "--out"]
    ended = mounted("size=8k", disk, *command, disk / "run")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: ") and "No space left" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_directory_below_a_file_raises(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/run cannot .*Not a directory"):
        checkpoint_on_full_disk.run(tmp_path / "file" / "run", 4)


def jumping_clock(monkeypatch, seconds, every=10**9):
    """Shifts the wall clock after 30 readings, or to and fro; counts the readings."""
    readings, real_time = itertools.count(), time.time

    def shifted_time():
        return real_time() + (next(readings) + every - 30) // every % 2 * seconds

    monkeypatch.setattr(time, "time", shifted_time)
    return readings


@pytest.mark.parametrize("seconds", [300, -86400])
def test_wall_clock_jumps_do_not_affect_training(tmp_path, monkeypatch, seconds):
    readings = jumping_clock(monkeypatch, seconds)
    history = checkpoint_on_full_disk.run(tmp_path, 16)
    assert next(readings) > 60, "the clock has jumped during the run"
    seconds = history["seconds"]
    assert (np.diff(seconds) >= 0).all() and 0 < seconds[0] and seconds[-1] < 250
    assert checkpoint_on_full_disk.latest_restorable(tmp_path) == 16


# The writer that timed out may end after its event loop is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_clock_that_jumps_by_days_keeps_complete_checkpoints(tmp_path, monkeypatch):
    """The jump exceeds the time limit of the writer."""
    checkpoint_on_full_disk.run(tmp_path, 8)
    with monkeypatch.context() as patch:
        jumping_clock(patch, 2 * 86400, every=1)
        with pytest.raises(CheckpointError, match=r"written into .* \(TimeoutError: "):
            checkpoint_on_full_disk.run(tmp_path, 8)
    assert checkpoint_on_full_disk.latest_restorable(tmp_path) >= 8
    checkpoint_on_full_disk.run(tmp_path, 16)
    assert checkpoint_on_full_disk.latest_restorable(tmp_path) >= 24


def test_only_monotonic_clocks_are_used():
    """Except for the start of a decoupled run, which its hosts must compare."""
    package = pathlib.Path(lsgd.__file__).parent
    start = ("supervisor.py", "ray_actors.py")
    for path in package.rglob("*.py"):
        if path.parent.name == "decoupled" and path.name in start:
            assert path.read_text().count("time.time(") == 1
        else:
            assert "time.time(" not in path.read_text(), path
