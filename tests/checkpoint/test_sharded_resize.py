"""Restore of sharded workers onto other numbers of workers and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import assert_same
from harness.selection import in_full
from harness.sharded_run import (
    abstract_params,
    different_workers,
    initial_params,
    make_cluster,
)

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, RunCheckpointer
from localsgd_jax.checkpoint.resize import stored_rows


def save(directory, workers, fsdp, model=1, rule=None):
    """Saves and returns a state with different workers."""
    cluster, mesh = make_cluster(workers, fsdp, model, rule)
    state = different_workers(cluster.init(initial_params(mesh)))
    with RunCheckpointer(directory, cluster) as checkpointer:
        checkpointer.save(state)
    return state


def mean_row(leaf):
    """Returns the mean over workers as NumPy accumulates it, row by row."""
    rows = np.asarray(leaf)
    if not jnp.issubdtype(rows.dtype, jnp.inexact):
        return rows[0]
    total = rows[0].astype(np.float32)
    for row in rows[1:]:
        total = total + row.astype(np.float32)
    return (total / np.float32(len(rows))).astype(rows.dtype)


# Workers, devices of each along two axes, and positions on the mesh.
@pytest.mark.parametrize(
    "old, new",
    [
        ((4, 2, 1), (2, 2, 2)),
        in_full((2, 4, 1), (4, 2, 1)),
        in_full((4, 2, 1), (3, 2, 1)),
        in_full((4, 2, 1), (8, 1, 1)),
        in_full((4, 2, 1), (1, 4, 2)),
        in_full((3, 2, 1), (4, 1, 2)),
        in_full((3, 1, 2), (4, 2, 2, 2)),
        in_full((2, 2, 2), (4, 4, 1, 1)),
    ],
)
def test_workers_start_from_the_mean_on_any_mesh(tmp_path, old, new):
    """The mean has the bits of NumPy if the number of workers is a power of two.

    Else the compiled program multiplies by the rounded inverse of the number.
    """
    stored = save(tmp_path, *old)
    cluster, mesh = make_cluster(*new[:3], positions=(*new, None)[3])
    template = cluster.init(abstract_params(mesh))
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        state, _ = checkpointer.restore(template)
    for leaf, like in zip(
        jax.tree.leaves(state), jax.tree.leaves(template), strict=True
    ):
        assert leaf.sharding == like.sharding and leaf.dtype == like.dtype
    assert_same(jax.tree.leaves(state.shared), jax.tree.leaves(stored.shared))
    for leaf, before in zip(
        jax.tree.leaves(state.workers), jax.tree.leaves(stored.workers), strict=True
    ):
        rows, mean = np.asarray(leaf), mean_row(before)
        assert all(row.tobytes() == rows[0].tobytes() for row in rows)
        if old[0] & (old[0] - 1) == 0:
            assert rows[0].tobytes() == mean.tobytes()
        else:
            np.testing.assert_allclose(rows[0], mean, rtol=1.2e-7)


@pytest.mark.full
def test_restored_state_trains(tmp_path):
    save(tmp_path, 4, 2)
    cluster, mesh = make_cluster(2, 2, 2)
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        state, _ = checkpointer.restore(cluster.init(abstract_params(mesh)))
        state, _ = cluster.step(state, np.ones((2, 1), np.float32))
        state = cluster.sync(state)
        checkpointer.save(state, 2)
    assert int(state.step) == 2


def test_device_reads_its_part_of_each_row():
    """On W positions of workers a device reads 1/W of the rows that it replaces."""
    cluster, mesh = make_cluster(2, 2, 2)
    state = cluster.init(abstract_params(mesh))
    for leaf in jax.tree.leaves(state.workers.params):
        target = stored_rows(leaf, 4)
        shard = target.sharding.shard_shape(target.shape)
        parts = 1 if leaf.shape[1:] == (3,) else 8
        assert shard[0] == 4 and np.prod(shard) * parts == np.prod(target.shape)


@pytest.mark.full
def test_rules_on_pieces_keep_the_axes_inside_a_worker(tmp_path):
    """The vectors of `flatten` are in the order of the devices of a worker."""
    rule = lsgd.flatten(lsgd.outer(optax.sgd(0.7, momentum=0.9), lsgd.average()))
    save(tmp_path, 2, 4, rule=rule)
    for fsdp in (4, 2):
        cluster, mesh = make_cluster(2, fsdp, rule=rule)
        template = cluster.init(initial_params(mesh))
        with RunCheckpointer(tmp_path, cluster) as checkpointer:
            if fsdp == 4:
                assert int(checkpointer.restore(template)[0].step) == 1
                continue
            message = "of pieces fsdp=4, model=1 in the checkpoint, .* fsdp=2, model=1"
            with pytest.raises(CheckpointError, match=message):
                checkpointer.restore(template)


def test_abstract_state_needs_a_checkpoint_and_no_reset_fields(tmp_path):
    cluster, mesh = make_cluster(2, 2)
    template = cluster.init(abstract_params(mesh))
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        with pytest.raises(CheckpointError, match="and the state is abstract"):
            checkpointer.restore(template)
        checkpointer.save(cluster.init(initial_params(mesh)))
        with pytest.raises(ValueError, match="reset_fields.*got an abstract state"):
            checkpointer.restore(template, reset_fields=["opt_state"])


@pytest.mark.full
def test_abstract_state_without_mesh_and_with_keys(tmp_path):
    """The restored state is on the default device, with typed keys."""
    algorithm = lsgd.from_train_step(lambda s, b: (s, {"loss": b}), lsgd.average())
    start = {"params": jnp.ones(3), "key": jax.random.key(0)}
    saved = lsgd.simulate(algorithm, 4)
    with RunCheckpointer(tmp_path, saved) as checkpointer:
        checkpointer.save(saved.init(start))
    for workers in (4, 6):
        cluster = lsgd.simulate(algorithm, workers)
        template = cluster.init(jax.eval_shape(lambda: start))
        with RunCheckpointer(tmp_path, cluster) as checkpointer:
            state, _ = checkpointer.restore(template)
        expected = cluster.init(start)
        assert_same(state.workers["params"], expected.workers["params"])
        assert state.workers["key"].dtype == expected.workers["key"].dtype
        assert state.workers["key"].shape == (workers,)
