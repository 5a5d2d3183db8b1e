"""Meshes set by the user: explicit axes, other meshes, and shardings in user code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import assert_close, mesh
from harness.selection import in_full, keep
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from localsgd_jax.execution.process_local import on_processes

WIDTH = 16
EXPLICIT = jax.make_mesh((2, 4), ("worker", "fsdp"))
AMBIENT = {
    "explicit": EXPLICIT,
    "automatic": lsgd.worker_mesh(2, inner_axes={"fsdp": 4}),
    "other": jax.make_mesh((4, 2), ("data", "model")),
}
ambient = pytest.mark.parametrize("name", keep(AMBIENT, ["explicit"]))


def loss_fn(params, batch):
    return jnp.mean((batch @ params["w"] - params["b"][None]) ** 2)


def algorithm(loss=loss_fn):
    return lsgd.local_sgd(loss, optax.adam(0.1), rule=lsgd.diloco())


def params():
    """Parameters on a mesh with explicit axes."""
    weight = NamedSharding(EXPLICIT, P("fsdp"))
    return {
        "w": jax.device_put(np.ones((WIDTH, WIDTH), np.float32), weight),
        "b": jax.device_put(np.ones(WIDTH, np.float32), NamedSharding(EXPLICIT, P())),
    }


def batches(count=4):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(2, 8, WIDTH)).astype(np.float32) for _ in range(count)]


def on_explicit_mesh(batch):
    """Places a batch on the mesh with explicit axes."""
    return jax.device_put(batch, NamedSharding(EXPLICIT, P("worker", "fsdp")))


def run(cluster, start, data):
    """Calls every function of a cluster, and both builders of programs."""
    state = cluster.init(start)
    state, _ = cluster.step(state, cluster.shard_batch(data[0]))
    state = cluster.sync(state, np.ones(2))
    state = cluster.sync_if(True, state)
    state, _ = jax.jit(lsgd.gated(cluster, lsgd.every(2)))(state, data[1])
    stacked = cluster.shard_batch(np.stack(data[2:]), time=True)
    state, _ = jax.jit(lsgd.fused(cluster))(state, stacked)
    return state, lsgd.consensus(state), cluster.bytes_sent(state)


@ambient
def test_cluster_does_not_depend_on_the_ambient_mesh(name):
    cluster = lsgd.on_mesh(algorithm(), EXPLICIT)
    expected = run(cluster, params(), batches())
    with jax.set_mesh(AMBIENT[name]):
        observed = run(cluster, params(), batches())
        abstract = cluster.init(
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                params(),
            )
        )
    assert_close(observed, expected, rtol=1e-6, atol=1e-7)
    weight = observed[0].workers.params["w"]
    assert weight.sharding.spec[:2] == ("worker", "fsdp")
    assert abstract.workers.params["w"].sharding.is_equivalent_to(weight.sharding, 3)
    assert set(weight.sharding.mesh.axis_types) == {AxisType.Auto}


@ambient
@pytest.mark.parametrize("placed", keep([False, True], [True]))
def test_train_does_not_depend_on_the_ambient_mesh(name, placed):
    """Also with batches on a mesh with explicit axes, and an evaluation."""
    cluster = lsgd.on_mesh(algorithm(), EXPLICIT)
    data = [on_explicit_mesh(batch) for batch in batches()] if placed else batches()

    def evaluate(model):
        return {"norm": jnp.sum(model["w"] ** 2)}

    def train():
        return lsgd.train(
            cluster,
            cluster.init(params()),
            data,
            schedule=2,
            evaluate=evaluate,
            progress=False,
        )

    expected, history = train()
    with jax.set_mesh(AMBIENT[name]):
        observed, same_history = train()
    assert_close(observed, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(same_history["norm"], history["norm"], rtol=1e-6)


def test_analysis_under_explicit_axes():
    cluster = lsgd.on_mesh(algorithm(), EXPLICIT)
    state, batch = cluster.init(params()), cluster.shard_batch(batches(1)[0])
    with jax.set_mesh(EXPLICIT):
        lsgd.assert_no_collectives(cluster.step, state, batch)
        ops = lsgd.collective_ops(cluster.sync, state)
    assert {op.axes for op in ops} == {("worker",)}


@pytest.mark.full
def test_process_local_functions_under_explicit_axes():
    cluster = on_processes(algorithm(), EXPLICIT, batch_spec=P("fsdp"))

    def run():
        state = cluster.init(params())
        stacked = cluster.local.shard_batch(np.stack(batches()), time=True)
        assert stacked.sharding.spec[2] == "fsdp"
        state, _ = cluster.local_steps(state, stacked)
        state, _ = cluster.sync(state, [1.0], weighted=True)
        return cluster.mean(state.workers.params)

    expected = run()
    with jax.set_mesh(EXPLICIT):
        assert_close(run(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("is_ambient", [False, True])
def test_constraints_with_names_of_inner_axes(is_ambient):
    """`with_sharding_constraint` takes a `PartitionSpec`, with and without set_mesh."""

    def constrained(params, batch):
        batch = jax.lax.with_sharding_constraint(batch, P(None, "fsdp"))
        return loss_fn(params, batch)

    cluster = lsgd.on_mesh(algorithm(constrained), EXPLICIT)
    state = cluster.init(params())
    if is_ambient:
        with jax.set_mesh(EXPLICIT):
            state, metrics = cluster.step(state, batches(1)[0])
    else:
        state, metrics = cluster.step(state, batches(1)[0])
    _, expected = lsgd.on_mesh(algorithm(), mesh(worker=2)).step(
        lsgd.on_mesh(algorithm(), mesh(worker=2)).init(
            jax.tree.map(np.asarray, params())
        ),
        batches(1)[0],
    )
    assert_close(metrics, expected, rtol=1e-5, atol=1e-6)


def with_out_sharding(params, batch):
    product = jnp.einsum("bd,de->be", batch, params["w"], out_sharding=P("fsdp"))
    return jnp.mean((product - params["b"][None]) ** 2)


def with_reshard(params, batch):
    return loss_fn(params, jax.sharding.reshard(batch, P("fsdp")))


@pytest.mark.parametrize("loss", [with_out_sharding, in_full(with_reshard)])
def test_explicit_shardings_in_user_code_name_the_remedy(loss):
    cluster = lsgd.on_mesh(algorithm(loss), EXPLICIT)
    state = cluster.init(params())
    with jax.set_mesh(EXPLICIT), pytest.raises(ValueError) as caught:
        cluster.step(state, batches(1)[0])
    message = str(caught.value)
    assert message.startswith("step(state, batch): mesh axes are automatic inside a")
    assert "with_sharding_constraint" in message and "explicit_axes" in message
    assert "\n" not in message


def test_explicit_axes_inside_a_step():
    """The remedy of the error message."""

    def loss(params, batch):
        explicit = jax.sharding.explicit_axes(
            with_out_sharding,
            axes=("fsdp",),
            in_sharding=({"w": P("fsdp"), "b": P()}, P("fsdp")),
        )
        return explicit(params, batch)

    made = [lsgd.on_mesh(algorithm(each), EXPLICIT) for each in (loss, loss_fn)]
    results = [one.step(one.init(params()), batches(1)[0]) for one in made]
    assert_close(*results, rtol=1e-5, atol=1e-6)


def test_other_errors_of_a_step_are_unchanged():
    def loss(params, batch):
        raise ValueError("unrelated")

    cluster = lsgd.on_mesh(algorithm(loss), EXPLICIT)
    with pytest.raises(ValueError, match="^unrelated"):
        cluster.step(cluster.init(params()), batches(1)[0])
