"""Damaged checkpoints, and runs that are killed at any time."""

import gc
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from harness.cases import assert_same
from harness.checkpoint_run import (
    K,
    initial_state,
    make_algorithm,
    save_with_eight_workers,
)
from harness.paths import PROGRAMS, PYTHONPATH
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, RunCheckpointer
from localsgd_jax.checkpoint.storage import CheckpointStorage

ENVIRONMENT = {
    "PYTHONPATH": PYTHONPATH,
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "4",
}


# Orbax leaves unfinished reads of a failed restore to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["truncate", in_full("remove")])
def test_damaged_checkpoint_raises(tmp_path, damage):
    """Each file is truncated or removed; some files hold redundant data."""
    state = save_with_eight_workers(tmp_path)
    cluster = lsgd.simulate(make_algorithm(), K)
    files = [path for path in (tmp_path / "5").rglob("*") if path.is_file()]
    failed = []
    for path in files:
        content = path.read_bytes()
        if damage == "truncate":
            path.write_bytes(content[: len(content) // 2])
        else:
            path.unlink()
        with RunCheckpointer(tmp_path, cluster) as checkpointer:
            try:
                assert_same(
                    checkpointer.restore(cluster.init(initial_state()))[0], state
                )
            except CheckpointError as error:
                assert "damaged" in str(error) and "checkpoint 5 in" in str(error)
                failed.append(path)
        path.write_bytes(content)
    assert len(failed) >= 3, failed
    gc.collect()
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        assert int(checkpointer.restore(cluster.init(initial_state()))[0].step) == 5


def test_empty_directory_counts_as_a_damaged_checkpoint(tmp_path):
    save_with_eight_workers(tmp_path)
    (tmp_path / "12345").mkdir()
    cluster = lsgd.simulate(make_algorithm(), K)
    start = cluster.init(initial_state())
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        with pytest.raises(CheckpointError, match="checkpoint 5 before it is intact"):
            checkpointer.restore(start)
        with pytest.warns(UserWarning, match="12345"):
            restored, _ = checkpointer.restore(start, fallback=True)
    assert int(restored.step) == 5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_repeated_kills_do_not_change_result(tmp_path):
    """Ten SIGKILLs at random times, compared with an uninterrupted run."""

    def start_run(name, pause):
        arguments = [str(tmp_path / name), str(tmp_path / f"{name}.npz"), str(pause)]
        return subprocess.Popen(
            [sys.executable, str(PROGRAMS / "killed_run.py"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
        )

    times, steps = random.Random(0), []
    for _ in range(10):
        run = start_run("killed", 0.02)
        steps.append(int(run.stdout.readline().split()[-1]))
        time.sleep(times.uniform(0.5, 3))
        run.kill()
        assert run.wait() == -9
        run.communicate()
    assert steps == sorted(steps) and len(set(steps)) > 3, steps
    for name in ("killed", "uninterrupted"):
        run = start_run(name, 0)
        _, errors = run.communicate(timeout=500)
        assert run.returncode == 0, errors[-2000:]
    killed = np.load(tmp_path / "killed.npz")
    uninterrupted = np.load(tmp_path / "uninterrupted.npz")
    assert killed.files == uninterrupted.files
    for name in uninterrupted.files:
        np.testing.assert_array_equal(killed[name], uninterrupted[name])


@pytest.mark.parametrize("process", [0, 1])
def test_first_process_of_a_process_local_job_writes(tmp_path, monkeypatch, process):
    monkeypatch.setattr("jax.process_index", lambda: process)
    storage = CheckpointStorage(
        tmp_path / "run", max_to_keep=2, process_local=True, read_only=False
    )
    assert (tmp_path / "run").exists() == (process == 0)
    storage.close()
