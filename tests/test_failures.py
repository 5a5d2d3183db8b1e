"""Full disks, directories that cannot be written, clocks that jump."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import one_disk
import pytest

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError

HERE = pathlib.Path(__file__).parent
MOUNT = "mount -t tmpfs -o {} none {}"


def mounted(options, directory, *command):
    """Runs a command that sees another file system at a directory; nobody else does."""
    line = f'{MOUNT.format(options, directory)} && exec "$@"'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", line, "sh", *map(str, command)],
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
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


def test_a_full_disk_loses_no_checkpoint(disk):
    command = [sys.executable, "one_disk.py", disk / "run", "400"]
    ended = mounted("size=3m", disk, *command)
    row = json.loads(ended.stdout)
    assert f"could not be written into {disk / 'run'} (No space left on" in row["error"]
    assert "those that are complete are still there" in row["error"]
    assert row["restored"] == row["complete"] and 4 <= row["restored"] < 400


def test_a_disk_that_cannot_be_written_is_told_at_once(disk):
    ended = mounted("ro", disk, sys.executable, "one_disk.py", disk / "run", "4")
    row = json.loads(ended.stdout)
    assert row["error"] == f"[Errno 30] Read-only file system: '{disk / 'run'}'"


def test_the_command_line_says_it_in_one_line(disk, tmp_path):
    (tmp_path / "data.svm").write_text("1 1:1\n-1 1:-1\n" * 8)
    train = f"train --data {tmp_path / 'data.svm'} --workers 2 --steps 64 --period 1"
    command = [sys.executable, "-m", "localsgd_jax", *train.split(), "--out"]
    ended = mounted("size=8k", disk, *command, disk / "run")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: ") and "No space left" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_directory_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory: '.*file/run'"):
        one_disk.run(tmp_path / "file" / "run", 4)


def jumping(monkeypatch, seconds, every=10**9):
    """Lets the clock jump at its 30th reading, or to and fro; counts the readings."""
    read, now = itertools.count(), time.time

    def jumped():
        return now() + (next(read) + every - 30) // every % 2 * seconds

    monkeypatch.setattr(time, "time", jumped)
    return read


@pytest.mark.parametrize("seconds", [300, -86400])
def test_clocks_that_jump_change_nothing(tmp_path, monkeypatch, seconds):
    read = jumping(monkeypatch, seconds)
    history = one_disk.run(tmp_path, 16)
    assert next(read) > 60, "the clock has jumped on the way"
    seconds = history["seconds"]
    assert (np.diff(seconds) >= 0).all() and 0 < seconds[0] and seconds[-1] < 250
    assert one_disk.restored(tmp_path) == 16


def test_a_clock_that_jumps_by_days_loses_no_checkpoint(tmp_path, monkeypatch):
    """The writer believes that its time is over."""
    one_disk.run(tmp_path, 8)
    with monkeypatch.context() as patch:
        jumping(patch, 2 * 86400, every=1)
        with pytest.raises(CheckpointError, match=r"written into .* \(TimeoutError: "):
            one_disk.run(tmp_path, 8)
    assert one_disk.restored(tmp_path) >= 8
    one_disk.run(tmp_path, 16)
    assert one_disk.restored(tmp_path) >= 24


def test_nothing_is_timed_by_a_clock_that_can_jump():
    package = pathlib.Path(lsgd.__file__).parent
    for path in package.rglob("*.py"):
        assert "time.time(" not in path.read_text(), path
