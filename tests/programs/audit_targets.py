"""User programs for `localsgd audit` and `localsgd plan --measure`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd

shape = jax.ShapeDtypeStruct
PENALTY = 0.05


def loss_fn(params, batch):
    inputs, targets = batch
    return jnp.mean((jnp.tanh(inputs @ params["w"]).sum(axis=-1) - targets) ** 2)


def parts(mesh, rule=None):
    algorithm = lsgd.local_sgd(loss_fn, optax.adam(1e-3), rule=rule or lsgd.average())
    cluster = lsgd.on_mesh(algorithm, mesh)
    state = cluster.init({"w": shape((256, 512), jnp.float32)})
    workers = cluster.num_workers
    batch = shape((workers, 32, 256), jnp.float32), shape((workers, 32), jnp.float32)
    return cluster, state, cluster.shard_batch(batch)


def local(mesh):
    cluster, state, batch = parts(mesh)
    return cluster.step, state, batch


def gated(mesh, rule=None):
    cluster, state, batch = parts(mesh, rule)
    return lsgd.gated(cluster, lsgd.every(8)), state, batch


def fused(mesh, rule=None):
    cluster, state, batch = parts(mesh, rule)
    stacked = jax.tree.map(lambda x: shape((6, *x.shape), x.dtype), batch)
    return lsgd.fused(cluster), state, cluster.shard_batch(stacked, time=True)


def gated_when(mesh):
    return gated(mesh, lsgd.when(lsgd.every(2), lsgd.average()))


def fused_when(mesh):
    return fused(mesh, lsgd.when(lsgd.every(2), lsgd.average()))


def gated_diloco(mesh):
    return gated(mesh, lsgd.diloco())


def gated_quantized(mesh):
    # XLA:TPU gathers scales by an all-reduce unless their number is a multiple of 128.
    quantized = lsgd.quantize(lsgd.average(), 8, block=128)
    return gated(mesh, lsgd.outer(optax.sgd(0.7), quantized))


def gated_gossip(mesh):
    return gated(mesh, lsgd.gossip("ring"))


def two_rounds(mesh, rule):
    """A synchronisation overlaps with the next round only in a program of both."""
    one_round, state, batches = fused(mesh, rule)

    def both(state, batches):
        state, _ = one_round(state, batches)
        return one_round(state, batches)

    return both, state, batches


def overlap(mesh):
    return two_rounds(mesh, lsgd.overlap(lsgd.flatten(lsgd.average())))


def overlap_in_shards(mesh):
    return two_rounds(mesh, lsgd.overlap(lsgd.shard_state(lsgd.diloco(), 8)))


def sync(mesh):
    cluster, state, _ = parts(mesh)
    return cluster.sync, state


def step_with_collective(mesh):
    cluster, state, batch = parts(mesh)

    def step(state, batch):
        state, metrics = cluster.step(state, batch)
        return state, {"loss": jnp.mean(metrics["loss"])}  # a collective

    return step, state, batch


def counter(mesh):
    cluster, state, batch = parts(mesh)

    def step(state, batch):
        state, metrics = cluster.step(state, batch)
        count = state.workers.opt_state[0].count  # per worker
        return cluster.sync_if(count[0] % 8 == 0, state), metrics

    return step, state, batch


def loop_with_collective(mesh):
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
    """The mean of a flat buffer, overlapped with local steps that do not read it."""
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
    sharding = jax.sharding.NamedSharding(mesh, axis)
    count = mesh.shape["worker"]
    return (
        function,
        shape((count, 1024, 1024), jnp.float32, sharding=sharding),
        shape((count, 6, 32, 1024), jnp.float32, sharding=sharding),
    )


def logistic(mesh, lanes=2):
    """For `localsgd plan --measure --steps`: also returns the loss of an example."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 6)).astype(np.float32)
    labels = np.sign(features @ np.ones(6) + rng.normal(size=400)).astype(np.float32)

    def loss(x, example):
        margin = example[1] * jnp.dot(example[0], x)
        return jax.nn.softplus(-margin) + PENALTY * jnp.sum(x**2) / 2

    def mean(x, batch):
        return jnp.mean(jax.vmap(loss, (None, 0))(x, batch))

    workers = lanes * mesh.shape["worker"]
    algorithm = lsgd.local_sgd(mean, optax.sgd(0.1), rule=lsgd.average())
    cluster = lsgd.on_mesh(algorithm, mesh, workers=workers)
    batch = next(lsgd.shuffled_batches((features, labels), workers, batch=5))
    state = cluster.init(jnp.zeros(6))
    return cluster, state, cluster.shard_batch(batch), loss, (features, labels)


def logistic_of_the_batch(mesh):
    return logistic(mesh)[:4]


def nonconvex(mesh):
    """A loss to which the bounds do not apply."""
    cluster, state, batch, *_ = logistic(mesh)
    return cluster, state, batch, lambda x, example: x[0] ** 2 - 3 * x[1] ** 2


def measured(mesh):
    """For `localsgd plan --measure`: returns a cluster, its state and a batch."""
    algorithm = lsgd.local_sgd(loss_fn, optax.adam(1e-3), rule=lsgd.average())
    cluster = lsgd.on_mesh(algorithm, mesh)
    workers = cluster.num_workers
    batch = jnp.ones((workers, 32, 256)), jnp.ones((workers, 32))
    return (
        cluster,
        cluster.init({"w": jnp.ones((256, 512))}),
        cluster.shard_batch(batch),
    )
