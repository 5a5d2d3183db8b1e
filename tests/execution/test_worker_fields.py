"""Replacement of a field of the train state of all workers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.cases import mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd


def keep_state(state, batch):
    return state


def make_cluster(kind):
    algorithm = lsgd.from_train_step(keep_state, lsgd.average())
    if kind == "simulate":
        return lsgd.simulate(algorithm, 4)
    return lsgd.on_mesh(algorithm, mesh(worker=2, fsdp=2), 4)


@pytest.mark.parametrize("kind", ["simulate", "mesh"])
def test_all_workers_get_the_value_and_shardings_are_kept(kind):
    cluster = make_cluster(kind)
    w = jnp.ones((4, 2))
    if kind == "mesh":
        w = jax.device_put(w, NamedSharding(mesh(worker=2, fsdp=2), P("fsdp")))
    state = cluster.init({"params": w, "key": jax.random.key(0), "seen": jnp.int32(3)})
    new = lsgd.replace_field(state, "params", np.full((4, 2), 7, np.float32))
    new = lsgd.replace_field(new, "seen", 0)
    np.testing.assert_array_equal(new.workers["params"], np.full((4, 4, 2), 7))
    np.testing.assert_array_equal(new.workers["seen"], np.zeros(4))
    for old_leaf, leaf in zip(*map(jax.tree.leaves, (state, new)), strict=True):
        assert leaf.sharding == old_leaf.sharding and leaf.dtype == old_leaf.dtype


def test_each_worker_gets_a_different_key():
    cluster = make_cluster("simulate")
    state = cluster.init({"params": jnp.zeros(2), "key": jax.random.key(0)})
    new = lsgd.replace_field(state, "key", jax.random.key(1))
    expected = cluster.init({"params": jnp.zeros(2), "key": jax.random.key(1)})
    data = jax.random.key_data(new.workers["key"])
    np.testing.assert_array_equal(data, jax.random.key_data(expected.workers["key"]))
    assert len(np.unique(data, axis=0)) == 4


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("seem", 0, r"field must be a field of the train state"),
        (
            "params",
            jnp.zeros(3),
            r"'params' of one worker, float32\[2\], got",
        ),
        ("params", jnp.zeros(2, jnp.int32), r"got int32\[2\]"),
        ("params", {"w": jnp.zeros(2)}, r"got .*'w': 'float32\[2\]'"),
    ],
)
def test_a_value_of_another_form_raises(field, value, message):
    cluster = make_cluster("simulate")
    state = cluster.init({"params": jnp.zeros(2)})
    with pytest.raises(ValueError, match=message):
        lsgd.replace_field(state, field, value)
