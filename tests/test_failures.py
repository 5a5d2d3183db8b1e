"""Full disks, directories that cannot be written, clocks that jump."""

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
from localsgd_jax.checkpoint import Checkpoints

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


def test_clocks_that_jump_change_nothing(tmp_path, monkeypatch):
    """An hour back, two days on, and so for ever."""
    jumps, now = iter(range(10**9)), time.time
    monkeypatch.setattr(
        time, "time", lambda: now() + [-3600, 2 * 86400][next(jumps) % 2]
    )
    seen = []
    place = one_disk.cluster()
    with Checkpoints(tmp_path, place) as saved:
        _, history = lsgd.train(
            place,
            place.init(one_disk.start()),
            lsgd.deal(np.arange(8, dtype=np.float32), 2, 2),
            every=2,
            steps=16,
            save=saved.save,
            save_every=4,
            record=lambda row: seen.append(row["seconds"]),
            progress=False,
        )
    assert next(jumps) > 0, "somebody reads the clock"
    assert seen == sorted(seen) and 0 < seen[0] and seen[-1] < 3600
    with Checkpoints(tmp_path, place) as saved:
        assert int(saved.restore(place.init(one_disk.start()))[0].step) == 16


def test_nothing_is_timed_by_a_clock_that_can_jump():
    package = pathlib.Path(lsgd.__file__).parent
    for path in package.rglob("*.py"):
        assert "time.time(" not in path.read_text(), path
