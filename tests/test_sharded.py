"""Workers over several devices: only a device's own piece travels, the numbers stay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_close, assert_same, mesh
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import Checkpoints
from localsgd_jax.flax import from_linen

WIDTH = 16
WHOLE = 3 * 2 * 4 * WIDTH * WIDTH * 4  # bytes of parameters and both moments
# How a worker's kernels lie on its own axis: by columns and rows (tensor parallel), or
# each along its leading axis (fully sharded).
LAYOUTS = {
    "model": {"Dense_0": P(None, "model"), "Dense_1": P("model", None)},
    "fsdp": {"Dense_0": P("fsdp", None), "Dense_1": P("fsdp", None)},
}
RULES = {
    "params": lsgd.average(),
    "opt_state": lsgd.floats(lsgd.average()),
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


def start():
    params = Model().init(jax.random.key(0), jnp.ones((1, WIDTH)))["params"]
    return TrainState.create(
        apply_fn=Model().apply, params=params, tx=optax.adamw(0.01)
    )


def sharded(state, devices, layout):
    """Places kernels, and the moments that go with them, on the axis of a worker."""
    auto = jax.sharding.Mesh(
        devices.devices, devices.axis_names, axis_types=(AxisType.Auto,) * 2
    )

    def place(path, leaf):
        names = [getattr(key, "key", None) for key in path]
        spec = next((layout[name] for name in names if name in layout), P())
        return jax.device_put(leaf, NamedSharding(auto, spec))

    return jax.tree.map_with_path(place, state)


def clusters(shape, axis):
    devices = mesh(**{"worker": shape[0], axis: shape[1]})
    algorithm, plain = from_linen(train_step, start(), RULES)
    placed = sharded(plain, devices, LAYOUTS[axis])
    return lsgd.on_mesh(algorithm, devices), placed, lsgd.simulate(algorithm, shape[0])


def batches(workers, steps):
    rng = np.random.default_rng(0)
    return [
        rng.normal(size=(workers, 5, WIDTH)).astype(np.float32) for _ in range(steps)
    ]


shapes = pytest.mark.parametrize("shape", [(4, 2), (2, 4)], ids=str)
axes = pytest.mark.parametrize("axis", ["model", "fsdp"])


@shapes
@axes
def test_a_synchronisation_moves_each_devices_own_piece(shape, axis):
    """One all-reduce of 1/m of the parameters and both moments; nothing is gathered."""
    cluster, placed, _ = clusters(shape, axis)
    state = cluster.init(placed)
    for leaf in jax.tree.leaves(state.workers.params):
        piece = leaf.sharding.shard_shape(leaf.shape)
        assert np.prod(piece) == leaf.size // 8
    found = lsgd.ledger(cluster.sync, state)
    assert {(entry.name, entry.axes) for entry in found} == {
        ("all-reduce", ("worker",))
    }
    assert sum(entry.bytes for entry in found) == WHOLE // shape[1]


@shapes
@axes
def test_sharded_workers_give_the_numbers_of_whole_ones(shape, axis):
    cluster, placed, plain = clusters(shape, axis)
    hands = batches(shape[0], 6)
    results = []
    for verbs, begin in ((cluster, placed), (plain, start())):
        step = jax.jit(lsgd.gated(verbs, lsgd.every(3)), donate_argnums=0)
        state = verbs.init(begin)
        for hand in hands:
            state, metrics = step(state, verbs.put(hand))
        results.append((state.workers.params, state.workers.opt_state, metrics))
    assert_close(*results, rtol=2e-5, atol=2e-6)


@shapes
def test_a_round_keeps_its_pieces_and_talks_to_workers_after_its_loop(shape):
    """Within the loop a worker's own devices talk; between workers, only after it."""
    cluster, placed, _ = clusters(shape, "model")
    state = cluster.init(placed)
    stacked = cluster.put(np.stack(batches(shape[0], 3)), time=True)
    found = lsgd.ledger(lsgd.fused(cluster), state, stacked)
    within = [entry for entry in found if entry.axes == ("model",)]
    between = [entry for entry in found if "worker" in entry.axes]
    assert within and all(entry.looped for entry in within)
    assert not any(entry.looped for entry in between)
    assert sum(entry.bytes for entry in between) == WHOLE // shape[1]
    after, _ = jax.jit(lsgd.fused(cluster))(state, stacked)
    for old, new in zip(
        jax.tree.leaves(state.workers.params),
        jax.tree.leaves(after.workers.params),
        strict=True,
    ):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)


def test_a_checkpoint_moves_from_whole_workers_to_sharded_ones(tmp_path):
    """Bit for bit onto the pieces, and to fewer workers by the mean."""
    cluster, placed, plain = clusters((4, 2), "model")
    with Checkpoints(tmp_path, plain) as saved:
        before, _ = plain.step(plain.init(start()), batches(4, 1)[0])
        saved.save(before)
    with Checkpoints(tmp_path, cluster) as saved:
        fresh = cluster.init(placed)
        after, _ = saved.restore(fresh)
    assert_same(jax.tree.leaves(after), jax.tree.leaves(before))
    fewer, placed, _ = clusters((2, 4), "model")
    with Checkpoints(tmp_path, fewer) as saved:
        halved, _ = saved.restore(fewer.init(placed))
    kernel = halved.workers.params["Dense_0"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, WIDTH, WIDTH)
    mean = np.asarray(before.workers.params["Dense_0"]["kernel"], np.float64).mean(0)
    np.testing.assert_allclose(kernel, np.stack([mean] * 2), rtol=1e-6, atol=1e-7)
    for leaf, like in zip(jax.tree.leaves(after), jax.tree.leaves(fresh), strict=True):
        assert leaf.sharding == like.sharding
