"""Batches of sharded workers: layout inside a worker, cost of a step, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import assert_close, mesh
from harness.selection import in_full
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from localsgd_jax.execution.layout import Layout

WIDTH = 64


def loss_fn(params, batch):
    hidden, _ = jax.lax.scan(
        jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), batch, params
    )
    return jnp.mean(hidden**2)


ALGORITHM = lsgd.local_sgd(loss_fn, optax.adam(0.01), rule=lsgd.average())


def cluster(batch_spec=None, **sizes):
    return lsgd.on_mesh(
        ALGORITHM, mesh(**(sizes or {"worker": 2, "fsdp": 4})), batch_spec=batch_spec
    )


def host_params():
    values = np.random.default_rng(0).normal(size=(2, WIDTH, WIDTH)) / WIDTH**0.5
    return values.astype(np.float32)


def params():
    devices = mesh(worker=2, fsdp=4)
    return jax.device_put(host_params(), NamedSharding(devices, P(None, "fsdp")))


def examples(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def assert_shards(x, values, shape):
    """Checks the shape and the values of the shard of each device."""
    for shard in x.addressable_shards:
        assert shard.data.shape == shape
        np.testing.assert_array_equal(shard.data, values[shard.index])


def test_host_batch_is_split_over_fsdp():
    batch = examples(2, 8, 3)
    placed = cluster().shard_batch(batch)
    assert_shards(placed, batch, (1, 2, 3))
    stacked = examples(5, 2, 8, 3)
    assert_shards(cluster().shard_batch(stacked, time=True), stacked, (5, 1, 2, 3))


@pytest.mark.parametrize(
    "sizes, spec, shape",
    [
        ({"worker": 2, "fsdp": 2, "model": 2}, None, (1, 4, 6)),
        ({"worker": 2, "fsdp": 2, "model": 2}, P("fsdp", "model"), (1, 4, 3)),
        ({"worker": 2, "fsdp": 2, "model": 2}, P(("fsdp", "model")), (1, 2, 6)),
        ({"worker": 2, "data": 2, "fsdp": 2}, None, (1, 2, 6)),
        in_full({"worker": 2, "fsdp": 2, "model": 2}, P(None, "model"), (1, 8, 3)),
        in_full({"worker": 2, "fsdp": 4}, P(), (1, 8, 6)),
        ({"worker": 4, "model": 2}, None, (2, 8, 6)),
    ],
)
def test_batch_spec(sizes, spec, shape):
    """The last case has two lanes and no axis that splits batches."""
    workers = 8 if sizes["worker"] == 4 else 2
    made = lsgd.on_mesh(ALGORITHM, mesh(**sizes), workers, batch_spec=spec)
    batch = examples(workers, 8, 6)
    assert_shards(made.shard_batch(batch), batch, shape)
    abstract = made.shard_batch(jax.ShapeDtypeStruct(batch.shape, batch.dtype))
    assert abstract.sharding == made.shard_batch(batch).sharding


def test_leaves_that_do_not_divide_stay_unsplit_by_default():
    batch = {"x": examples(2, 8, 3), "odd": examples(2, 3), "seed": np.arange(2)}
    placed = cluster().shard_batch(batch)
    shapes = {name: x.sharding.shard_shape(x.shape) for name, x in placed.items()}
    assert shapes == {"x": (1, 2, 3), "odd": (1, 3), "seed": (1,)}


def test_batch_spec_may_be_a_pytree_prefix():
    spec = {"inputs": P("fsdp"), "scale": P(), "rest": None}
    batch = {
        "inputs": (examples(2, 8, 3), examples(2, 4)),
        "scale": examples(2, 8),
        "rest": examples(2, 8),
    }
    made = cluster(spec)
    placed = made.shard_batch(batch)
    shapes = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), placed)
    assert shapes["inputs"] == ((1, 2, 3), (1, 1)) and shapes["scale"] == (1, 8)
    assert shapes["rest"] == (1, 2)
    assert lsgd.local_workers(made).tolist() == [0, 1]
    with pytest.raises(ValueError, match="batch_spec must be a pytree prefix of the"):
        made.shard_batch(examples(2, 8, 3))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, None])
def test_placed_batch_keeps_its_layout(kind):
    """Also one on a mesh with explicit axes, the default of `jax.make_mesh`."""
    devices = mesh(worker=2, fsdp=4)
    if kind is not None:
        devices = jax.make_mesh((2, 4), ("worker", "fsdp"), axis_types=(kind,) * 2)
    batch = examples(2, 3, 8)
    placed = jax.device_put(batch, NamedSharding(devices, P("worker", None, "fsdp")))
    made = cluster(P("fsdp"))
    assert_shards(made.shard_batch(placed), batch, (1, 3, 2))
    assert_shards(made.shard_batch(made.shard_batch(placed)), batch, (1, 3, 2))
    # Rows are distributed over workers, wherever they were.
    inner_only = jax.device_put(batch, NamedSharding(devices, P(None, None, "fsdp")))
    assert_shards(made.shard_batch(inner_only), batch, (1, 3, 2))
    with jax.set_mesh(devices):
        assert_shards(made.shard_batch(placed), batch, (1, 3, 2))


def test_train_keeps_the_layout_of_placed_batches():
    """The stacked batches of a dispatch are split as each of them was."""
    seen = []
    made = cluster(P())

    def shard_batch(batch, time=False):
        placed = made.shard_batch(batch, time)
        if time:
            seen.append(placed.sharding.spec)
        return placed

    devices = mesh(worker=2, fsdp=4)
    batch = jax.device_put(
        examples(2, 8, WIDTH), NamedSharding(devices, P("worker", "fsdp"))
    )
    recording = made._replace(shard_batch=shard_batch)
    arguments = made.init(params()), [batch] * 4
    lsgd.train(recording, *arguments, schedule=2, progress=False)
    assert seen and {spec[2] for spec in seen} == {"fsdp"}


def compiled_step(batch_spec):
    """Costs of a step on one device: flops, temporary bytes, bytes sent."""
    made = cluster(batch_spec)
    state, batch = made.init(params()), made.shard_batch(examples(2, 8, 64, WIDTH))
    compiled = jax.jit(made.step, donate_argnums=0).lower(state, batch).compile()
    ops = lsgd.collective_ops(compiled, mesh=mesh(worker=2, fsdp=4))
    assert all(op.axes == ("fsdp",) for op in ops)
    return (
        compiled.cost_analysis()["flops"],
        compiled.memory_analysis().temp_size_in_bytes,
        sum(op.bytes_sent for op in ops),
    )


def test_default_layout_costs_less_than_a_unsplit_batch():
    """Half of the memory and a tenth of the bytes; CPUs do the same arithmetic."""
    flops, temporary, sent = compiled_step(None)
    unsplit_flops, unsplit_temporary, unsplit_sent = compiled_step(P())
    assert flops < 1.01 * unsplit_flops
    assert temporary < 0.6 * unsplit_temporary
    assert sent < 0.2 * unsplit_sent


@pytest.mark.full
def test_layout_does_not_change_the_result():
    batches = [examples(2, 8, 3, WIDTH) for _ in range(4)]
    results = []
    for made in (cluster(), cluster(P()), lsgd.simulate(ALGORITHM, 2)):
        state = made.init(params() if len(results) < 2 else host_params())
        state, history = lsgd.train(
            made, state, batches, schedule=2, progress=False, max_steps_per_dispatch=2
        )
        results.append((state.workers.params, history["loss"]))
    assert_close(results[0], results[2], rtol=1e-4, atol=1e-4)
    assert_close(results[1], results[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spec, error, message",
    [
        ("fsdp", TypeError, r"must be a PartitionSpec or a pytree of them, got 'fsdp'"),
        (P("model"), ValueError, r"axes inside a worker, each once, of \('fsdp',\)"),
        (P("worker"), ValueError, r"axes inside a worker, .*got P\w*\('worker',?\)"),
        in_full(P("fsdp", "fsdp"), ValueError, "axes inside a worker, each once"),
        in_full([P(), 3], TypeError, "must be a PartitionSpec .*, got 3"),
    ],
)
def test_invalid_batch_spec_raises(spec, error, message):
    with pytest.raises(error, match=r"on_mesh\(batch_spec\): .*" + message):
        cluster(spec)


@pytest.mark.parametrize(
    "spec, shape",
    [
        (P("fsdp"), (2, 6, 3)),
        in_full(P(None, "fsdp"), (2, 8, 3)),
        in_full(P(None, "fsdp"), (2, 8)),
    ],
)
def test_batch_that_does_not_divide_raises(spec, shape):
    with pytest.raises(ValueError, match=r"must divide the batch of a worker") as error:
        cluster(spec).shard_batch({"x": examples(*shape)})
    assert f"got shape {shape[1:]} at ['x']" in str(error.value)
    assert "\n" not in str(error.value)


def test_batches_are_split_over_workers_after_the_time_axis():
    layout = Layout.on_mesh(mesh(worker=4, fsdp=2), ("worker",), 1)
    assert layout.batch_sharding().spec == P(("worker",))
    assert layout.batch_sharding(time=True).spec == P(None, ("worker",))
