"""Programs for `localsgd audit`, as users write them."""

import jax
import jax.numpy as jnp
import optax

import localsgd_jax as lsgd

shape = jax.ShapeDtypeStruct


def loss_fn(params, batch):
    inputs, targets = batch
    return jnp.mean((jnp.tanh(inputs @ params["w"]).sum(axis=-1) - targets) ** 2)


def parts(mesh, rule=None):
    algorithm = lsgd.local_sgd(loss_fn, optax.adam(1e-3), rule=rule or lsgd.average())
    cluster = lsgd.on_mesh(algorithm, mesh)
    state = cluster.init({"w": shape((256, 512), jnp.float32)})
    workers = cluster.workers
    batch = shape((workers, 32, 256), jnp.float32), shape((workers, 32), jnp.float32)
    return cluster, state, cluster.put(batch)


def local(mesh):
    cluster, state, batch = parts(mesh)
    return cluster.step, state, batch


def gated(mesh, rule=None):
    cluster, state, batch = parts(mesh, rule)
    return lsgd.gated(cluster, lsgd.every(8)), state, batch


def fused(mesh, rule=None):
    cluster, state, batch = parts(mesh, rule)
    stacked = jax.tree.map(lambda x: shape((6, *x.shape), x.dtype), batch)
    return lsgd.fused(cluster), state, cluster.put(stacked, time=True)


def sync(mesh):
    cluster, state, _ = parts(mesh)
    return cluster.sync, state


def noisy(mesh):
    cluster, state, batch = parts(mesh)

    def step(state, batch):
        state, metrics = cluster.step(state, batch)
        return state, {"loss": jnp.mean(metrics["loss"])}  # asks everybody

    return step, state, batch


def counter(mesh):
    cluster, state, batch = parts(mesh)

    def step(state, batch):
        state, metrics = cluster.step(state, batch)
        count = state.workers.opt_state[0].count  # a worker's own
        return cluster.sync_if(count[0] % 8 == 0, state), metrics

    return step, state, batch


def noisy_loop(mesh):
    cluster, state, batch = parts(mesh)

    def one_round(state, batch):
        return jax.lax.fori_loop(0, 4, lambda _, state: cluster.sync(state), state)

    return one_round, state, batch


def arrays(mesh):
    algorithm = lsgd.local_sgd(loss_fn, optax.adam(1e-3), rule=lsgd.average())
    cluster = lsgd.on_mesh(algorithm, mesh)
    return cluster.sync, cluster.init({"w": jnp.zeros((256, 512))})


def nothing(mesh):
    return None


def overlapped(mesh):
    """The mean of one flat buffer beside the local steps that do not read it yet."""
    axis = jax.sharding.PartitionSpec("worker")

    def one(params, batch):
        mean = jax.lax.pmean(params[0], "worker")

        def step(w, x):
            return w - 0.1 * jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w), None

        after, _ = jax.lax.scan(step, params[0], batch[0])
        return (mean + (after - params[0]))[None]

    function = jax.shard_map(
        one, mesh=mesh, in_specs=(axis, axis), out_specs=axis, check_vma=False
    )
    split = jax.sharding.NamedSharding(mesh, axis)
    count = mesh.shape["worker"]
    return (
        function,
        shape((count, 1024, 1024), jnp.float32, sharding=split),
        shape((count, 6, 32, 1024), jnp.float32, sharding=split),
    )
