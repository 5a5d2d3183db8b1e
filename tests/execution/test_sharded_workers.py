"""Workers sharded over several devices: shard sizes, communication and results."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from harness.cases import assert_close, assert_same, mesh
from harness.selection import in_full
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import RunCheckpointer
from localsgd_jax.flax import from_linen

WIDTH = 16
TOTAL_BYTES = 3 * 2 * 4 * WIDTH * WIDTH * 4  # parameters and both moments
# Sharding of the kernels over the inner axis: by columns and rows (tensor parallel), or
# along the leading axis of each (fully sharded).
LAYOUTS = {
    "model": {"Dense_0": P(None, "model"), "Dense_1": P("model", None)},
    "fsdp": {"Dense_0": P("fsdp", None), "Dense_1": P("fsdp", None)},
}
RULES = {
    "params": lsgd.average(),
    "opt_state": lsgd.floating_only(lsgd.average()),
}


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4 * WIDTH, use_bias=False)(x))
        return nn.Dense(WIDTH, use_bias=False)(x)


def train_step(state, batch):
    def loss_fn(params):
        return jnp.mean((state.apply_fn({"params": params}, batch) - batch) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), {"loss": loss}


def initial_state():
    params = Model().init(jax.random.key(0), jnp.ones((1, WIDTH)))["params"]
    return TrainState.create(
        apply_fn=Model().apply, params=params, tx=optax.adamw(0.01)
    )


def shard_state(state, devices, layout):
    """Shards kernels and their moments over the inner axis."""
    auto = jax.sharding.Mesh(
        devices.devices, devices.axis_names, axis_types=(AxisType.Auto,) * 2
    )

    def put(path, leaf):
        names = [getattr(key, "key", None) for key in path]
        spec = next((layout[name] for name in names if name in layout), P())
        return jax.device_put(leaf, NamedSharding(auto, spec))

    return jax.tree.map_with_path(put, state)


def clusters(shape, axis):
    """A cluster of sharded workers, its initial train state, and a simulation."""
    devices = mesh(**{"worker": shape[0], axis: shape[1]})
    algorithm, unsharded = from_linen(train_step, initial_state(), RULES)
    sharded = shard_state(unsharded, devices, LAYOUTS[axis])
    placed = lsgd.on_mesh(algorithm, devices)
    return placed, sharded, lsgd.simulate(algorithm, shape[0])


def make_batches(workers, steps):
    rng = np.random.default_rng(0)
    return [
        rng.normal(size=(workers, 5, WIDTH)).astype(np.float32) for _ in range(steps)
    ]


SHAPES = [pytest.param((4, 2), id="(4, 2)"), in_full((2, 4), id="(2, 4)")]
shapes = pytest.mark.parametrize("shape", SHAPES)
shapes_and_axes = pytest.mark.parametrize(
    "shape, axis",
    [
        ((4, 2), "model"),
        in_full((2, 4), "model"),
        in_full((4, 2), "fsdp"),
        ((2, 4), "fsdp"),
    ],
)


@shapes_and_axes
def test_synchronisation_reduces_the_shards_of_each_device(shape, axis):
    """One all-reduce of 1/m of the parameters and both moments; nothing is gathered."""
    cluster, sharded, _ = clusters(shape, axis)
    state = cluster.init(sharded)
    for leaf in jax.tree.leaves(state.workers.params):
        shard = leaf.sharding.shard_shape(leaf.shape)
        assert np.prod(shard) == leaf.size // 8
    ops = lsgd.collective_ops(cluster.sync, state)
    assert {(op.name, op.axes) for op in ops} == {("all-reduce", ("worker",))}
    assert sum(op.bytes for op in ops) == TOTAL_BYTES // shape[1]


@shapes_and_axes
def test_sharded_workers_match_unsharded(shape, axis):
    cluster, sharded, simulated = clusters(shape, axis)
    batches = make_batches(shape[0], 6)
    results = []
    for placed, start in ((cluster, sharded), (simulated, initial_state())):
        step = jax.jit(lsgd.gated(placed, lsgd.every(3)), donate_argnums=0)
        state = placed.init(start)
        for batch in batches:
            state, metrics = step(state, placed.shard_batch(batch))
        results.append((state.workers.params, state.workers.opt_state, metrics))
    assert_close(*results, rtol=2e-5, atol=2e-6)


@shapes
def test_round_communicates_between_workers_only_after_loop(shape):
    """Inside the loop only the devices of one worker communicate."""
    cluster, sharded, _ = clusters(shape, "model")
    state = cluster.init(sharded)
    stacked = cluster.shard_batch(np.stack(make_batches(shape[0], 3)), time=True)
    ops = lsgd.collective_ops(lsgd.fused(cluster), state, stacked)
    inner = [op for op in ops if op.axes == ("model",)]
    outer = [op for op in ops if "worker" in op.axes]
    assert inner and all(op.in_loop for op in inner)
    assert not any(op.in_loop for op in outer)
    assert sum(op.bytes for op in outer) == TOTAL_BYTES // shape[1]
    after, _ = jax.jit(lsgd.fused(cluster))(state, stacked)
    for old, new in zip(
        jax.tree.leaves(state.workers.params),
        jax.tree.leaves(after.workers.params),
        strict=True,
    ):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)


def test_checkpoint_restores_onto_sharded_workers(tmp_path):
    """Bitwise for equally many workers; by the mean for fewer workers."""
    cluster, sharded, simulated = clusters((4, 2), "model")
    with RunCheckpointer(tmp_path, simulated) as checkpointer:
        batch = make_batches(4, 1)[0]
        before, _ = simulated.step(simulated.init(initial_state()), batch)
        checkpointer.save(before)
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        fresh = cluster.init(sharded)
        after, _ = checkpointer.restore(fresh)
    assert_same(jax.tree.leaves(after), jax.tree.leaves(before))
    fewer, sharded, _ = clusters((2, 4), "model")
    with RunCheckpointer(tmp_path, fewer) as checkpointer:
        halved, _ = checkpointer.restore(fewer.init(sharded))
    kernel = halved.workers.params["Dense_0"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, WIDTH, WIDTH)
    mean = np.asarray(before.workers.params["Dense_0"]["kernel"], np.float64).mean(0)
    np.testing.assert_allclose(kernel, np.stack([mean] * 2), rtol=1e-6, atol=1e-7)
    for leaf, like in zip(jax.tree.leaves(after), jax.tree.leaves(fresh), strict=True):
        assert leaf.sharding == like.sharding
