"""Damaged checkpoints, concurrent jobs, and restore of sharded workers."""

import gc
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import assert_close, assert_same, mesh
from harness.paths import PYTHONPATH
from harness.selection import in_full
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, RunCheckpointer


def make_cluster(workers=2, fsdp=4, rule=None):
    """Returns a cluster of sharded workers and its initial state."""
    devices = mesh(worker=workers, fsdp=fsdp)
    algorithm = lsgd.local_sgd(
        lambda p, b: jnp.sum((p["w"] - b) ** 2),
        optax.adam(0.1),
        rule=rule or lsgd.diloco(),
    )
    cluster = lsgd.on_mesh(algorithm, devices)
    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    return cluster, cluster.init(
        {"w": jax.device_put(w, NamedSharding(devices, P("fsdp")))}
    )


def save_steps(directory, cluster, state, steps=2):
    """Saves a checkpoint after each of some steps; returns the states."""
    states = []
    with RunCheckpointer(directory, cluster) as checkpointer:
        for step in range(steps):
            batch = jnp.arange(cluster.num_workers, dtype=jnp.float32) + step
            state, _ = cluster.step(state, batch)
            states.append(state)
            checkpointer.save(state, step + 1)
    return states


def data_file(directory, step):
    """Returns the file of a checkpoint that holds most of the arrays."""
    files = [x for x in (directory / str(step)).rglob("*") if x.is_file()]
    return max(files, key=lambda x: x.stat().st_size)


def flip(path, position, bit=6):
    """Flips a bit of a file."""
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)


# Orbax abandons coroutines of the other leaves after an error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_flipped_bits_are_detected_and_the_checkpoint_before_is_offered(tmp_path):
    cluster, initial = make_cluster()
    states = save_steps(tmp_path, cluster, initial)
    path = data_file(tmp_path, 2)
    intact = path.read_bytes()
    for position in np.linspace(len(intact) // 4, 3 * len(intact) // 4, 4, dtype=int):
        flip(path, int(position))
        with RunCheckpointer(tmp_path, cluster) as checkpointer:
            with pytest.raises(CheckpointError, match="damaged.* 1"):
                checkpointer.restore(initial)
        path.write_bytes(intact)
    flip(path, len(intact) // 2)
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        with pytest.warns(UserWarning, match="damaged"):
            restored, examples_seen = checkpointer.restore(initial, fallback=True)
    assert_same(restored, states[0])
    assert examples_seen == 1 and (tmp_path / "2.damaged").is_dir()
    gc.collect()


def test_changed_metadata_is_detected(tmp_path):
    cluster, initial = make_cluster()
    save_steps(tmp_path, cluster, initial, steps=1)
    changed = 0
    for path in tmp_path.rglob("metadata"):
        text = path.read_text() if path.is_file() else ""
        if '"examples_seen"' in text:
            path.write_text(text.replace('"examples_seen": 1', '"examples_seen": 3'))
            changed += path.read_text() != text
    assert changed == 1
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        with pytest.raises(CheckpointError, match="damaged"):
            checkpointer.restore(initial)


@pytest.mark.parametrize(
    "old, new", [((4, 2), (2, 4)), in_full((2, 4), (4, 2)), in_full((2, 4), (2, 2))]
)
def test_sharded_workers_restore_onto_another_number(tmp_path, old, new):
    """Other workers start from the mean, with the shardings of the new state."""
    cluster, initial = make_cluster(*old)
    (stored,) = save_steps(tmp_path, cluster, initial, steps=1)
    other, template = make_cluster(*new)
    with RunCheckpointer(tmp_path, other) as checkpointer:
        restored, _ = checkpointer.restore(template)
    expected = np.asarray(stored.workers.params["w"])
    if old[0] != new[0]:
        expected = np.stack([expected.mean(0)] * new[0])
    assert_close(restored.workers.params["w"], expected, 1e-6)
    assert_same(restored.shared, stored.shared)
    for x, like in zip(
        jax.tree.leaves(restored), jax.tree.leaves(template), strict=True
    ):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)


def test_second_job_raises_and_stale_lock_is_replaced(tmp_path):
    cluster, state = make_cluster()
    with RunCheckpointer(tmp_path / "run", cluster):
        with pytest.raises(CheckpointError, match=r"is in use by .*pid"):
            RunCheckpointer(tmp_path / "run", cluster)
    program = (
        "import os, signal, sys, jax.numpy as jnp, optax, localsgd_jax as lsgd\n"
        "from localsgd_jax.checkpoint import RunCheckpointer\n"
        "algorithm = lsgd.local_sgd(lambda w, b: jnp.sum(w), optax.sgd(0.1),"
        " rule=lsgd.average())\n"
        "saved = RunCheckpointer(sys.argv[1], lsgd.simulate(algorithm, 1))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = [sys.executable, "-c", program, str(tmp_path / "killed")]
    env = {"PYTHONPATH": PYTHONPATH, "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    assert subprocess.run(run, env=env, timeout=120).returncode == -9
    with RunCheckpointer(tmp_path / "killed", cluster) as checkpointer:
        checkpointer.save(state, 0)


def test_save_after_close_and_bad_positions_raise(tmp_path):
    cluster, state = make_cluster()
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        with pytest.raises(ValueError, match=r"save\(examples_seen\).*-5"):
            checkpointer.save(state, -5)
        with pytest.raises((TypeError, ValueError), match=r"save\(examples_seen\)"):
            checkpointer.save(state, 2.5)
    with pytest.raises(CheckpointError, match="closed"):
        checkpointer.save(state, 1)
    assert json.dumps(sorted(x.name for x in tmp_path.iterdir())) == "[]"
