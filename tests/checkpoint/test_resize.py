"""Restore onto another number of workers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.cases import assert_same, key_data, mesh
from harness.checkpoint_run import (
    BATCH,
    DATA,
    K,
    batches_from,
    initial_state,
    make_algorithm,
    save_with_eight_workers,
)
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import RunCheckpointer
from localsgd_jax.checkpoint.resize import resize_rows


@pytest.mark.parametrize("workers", [in_full(1), in_full(3), 4, in_full(12)])
def test_restore_onto_other_number_of_workers(tmp_path, workers):
    old = save_with_eight_workers(tmp_path)
    devices = mesh(worker=4) if workers % 4 == 0 else mesh(worker=1)
    cluster = lsgd.on_mesh(make_algorithm(), devices, workers=workers)
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        initial = cluster.init(initial_state())
        new, examples_seen = checkpointer.restore(initial)
    assert examples_seen == 5 * K * BATCH
    assert (int(new.step), int(new.round)) == (5, 1)
    assert_same(new.shared, old.shared)

    def means(tree):
        floats = [x for x in jax.tree.leaves(tree) if x.dtype == jnp.float32]
        return [np.mean(np.asarray(x), axis=0, dtype=np.float64) for x in floats]

    parts = (
        lambda state: state.workers["params"],
        lambda state: state.workers["opt_state"],
        lambda state: state.local,
    )
    for part in parts:
        for leaf in jax.tree.leaves(part(new)):
            assert leaf.shape[0] == workers
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
        for left, right in zip(means(part(new)), means(part(old)), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-7)
    assert new.workers["seen"].tolist() == [5] * workers
    keys, before = key_data(new.workers["key"]), key_data(old.workers["key"])
    np.testing.assert_array_equal(keys[:K], before[:workers])
    assert len(np.unique(keys, axis=0)) == workers
    assert [x.sharding for x in jax.tree.leaves(new)] == [
        x.sharding for x in jax.tree.leaves(initial)
    ]
    state, _ = cluster.step(new, next(batches_from(cluster, examples_seen)))
    assert int(cluster.sync(state).round) == 2


@pytest.mark.parametrize("workers", [1, 3])
def test_integers_are_copied_from_worker_0(workers):
    like = jnp.zeros((workers, 2), jnp.int32)
    resized = resize_rows(jnp.array([[3, 4], [9, 10]]), like)
    np.testing.assert_array_equal(resized, [[3, 4]] * workers)


@pytest.mark.full
def test_resized_workers_get_distinct_keys(tmp_path):
    save_with_eight_workers(tmp_path)
    for step, workers in ((6, 12), (7, 16)):
        cluster = lsgd.simulate(make_algorithm(), workers)
        with RunCheckpointer(tmp_path, cluster) as checkpointer:
            state, examples_seen = checkpointer.restore(cluster.init(initial_state()))
            state, _ = cluster.step(state, next(batches_from(cluster, examples_seen)))
            assert int(state.step) == step
            checkpointer.save(state, workers * BATCH)
    assert len(np.unique(key_data(state.workers["key"]), axis=0)) == 16


def test_reset_fields_on_resize(tmp_path):
    save_with_eight_workers(tmp_path)
    cluster = lsgd.simulate(make_algorithm(), 4)
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        state, _ = checkpointer.restore(
            cluster.init(initial_state()), reset_fields=["opt_state"]
        )
    assert_same(
        state.workers["opt_state"], cluster.init(initial_state()).workers["opt_state"]
    )
    assert np.any(state.workers["params"]["w"])


def test_unknown_reset_field_raises(tmp_path):
    save_with_eight_workers(tmp_path)
    cluster = lsgd.simulate(make_algorithm(), 2)
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        with pytest.raises(ValueError, match="'moments'"):
            checkpointer.restore(
                cluster.init(initial_state()), reset_fields=["moments"]
            )


@pytest.mark.full
def test_resize_keeps_data_order(tmp_path):
    seen, examples_seen = [], 0
    for workers, steps in ((8, 2), (3, 4), (5, 3)):
        cluster = lsgd.simulate(make_algorithm(), workers)
        with RunCheckpointer(tmp_path, cluster) as checkpointer:
            state, examples_seen = checkpointer.restore(cluster.init(initial_state()))
            batches = list(
                itertools.islice(batches_from(cluster, examples_seen), steps)
            )
            lsgd.train(
                cluster,
                state,
                batches,
                schedule=2,
                save=checkpointer.save,
                progress=False,
            )
        seen += [row for batch in batches for row in batch.reshape(-1, 3).tolist()]
    expected = itertools.islice(
        lsgd.shuffled_batches(DATA, workers=1, batch=1), len(seen)
    )
    assert seen == [batch[0, 0].tolist() for batch in expected]
