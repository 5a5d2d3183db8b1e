"""Baselines in JAX, on two devices of this process.

Each function takes a problem and returns two functions: `step` runs T steps from the
state of its last call and blocks until they are done, `params` returns the parameters.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from benchmarks.baselines.problem import WORKERS, Problem
from benchmarks.timing import make_stepper

make_outer = partial(optax.sgd, 0.7, momentum=0.9, nesterov=True)


def make_mesh(name: str) -> Mesh:
    """Returns a mesh of two devices."""
    return Mesh(jax.devices()[:WORKERS], (name,), axis_types=(AxisType.Auto,))


def make_cluster(problem: Problem, rule: lsgd.SyncRule) -> lsgd.Cluster:
    """Returns two workers on two devices."""
    algorithm = lsgd.local_sgd(problem.loss, optax.sgd(problem.rate), rule)
    return lsgd.on_mesh(algorithm, make_mesh("worker"))


def split_time(batches: tuple, count: int) -> list[tuple]:
    """Splits batches `(T, ...)` into `count` parts along time."""
    columns = (np.split(x, count) for x in batches)
    return [*zip(*columns, strict=True)]


def fused(problem: Problem, rule: lsgd.SyncRule) -> tuple[Callable, Callable]:
    """Sets up the library with one dispatch per round."""
    cluster = make_cluster(problem, rule)
    one_round = jax.jit(lsgd.fused(cluster), donate_argnums=0)
    batches = [
        cluster.shard_batch(x, time=True)
        for x in split_time(problem.batches, problem.rounds)
    ]
    return continue_from(
        one_round, cluster.init(problem.params), batches, lsgd.consensus
    )


def gated(
    problem: Problem, rule: lsgd.SyncRule, period: int | None = None
) -> tuple[Callable, Callable]:
    """Sets up the library with one dispatch per step."""
    cluster = make_cluster(problem, rule)
    step = lsgd.gated(cluster, lsgd.every(period or problem.period))
    batches = [
        cluster.shard_batch(jax.tree.map(lambda x: x[0], batch))
        for batch in split_time(problem.batches, problem.steps)
    ]
    call = jax.jit(step, donate_argnums=0)
    return continue_from(call, cluster.init(problem.params), batches, lsgd.consensus)


def with_train(problem: Problem, rule: lsgd.SyncRule) -> tuple[Callable, Callable]:
    """Sets up the library's `train`, which stacks and transfers NumPy batches."""
    cluster = make_cluster(problem, rule)
    batches = [
        jax.tree.map(lambda x: x[0], batch)
        for batch in split_time(problem.batches, problem.steps)
    ]
    held = [cluster.init(problem.params)]

    def step() -> None:
        held[0], _ = lsgd.train(
            cluster, held[0], batches, schedule=problem.period, progress=False
        )
        jax.block_until_ready(held[0])

    return step, lambda: lsgd.consensus(held[0])


def data_parallel(problem: Problem) -> tuple[Callable, Callable]:
    """Sets up data-parallel SGD in plain JAX, jitted and with donation."""
    mesh, optimizer = make_mesh("data"), optax.sgd(problem.rate)

    def step(state, batch):
        params, opt_state = state
        loss, grad = jax.value_and_grad(problem.loss)(params, batch)
        updates, opt_state = optimizer.update(grad, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    split = NamedSharding(mesh, P("data"))
    batches = [
        jax.device_put(jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), x), split)
        for x in split_time(problem.batches, problem.steps)
    ]
    start = problem.params, optimizer.init(problem.params)
    start = jax.device_put(jax.tree.map(jnp.array, start), NamedSharding(mesh, P()))
    call = jax.jit(step, donate_argnums=0)
    return continue_from(call, start, batches, lambda state: state[0])


def drjax_steps(problem: Problem) -> tuple[Callable, Callable]:
    """Sets up DiLoCo with DrJAX: one program per local step and one per outer step."""
    import drjax

    optimizer, outer = optax.sgd(problem.rate), make_outer()
    mesh = make_mesh("clients")
    batches = [
        jax.device_put(
            jax.tree.map(lambda x: x[0], batch), NamedSharding(mesh, P("clients"))
        )
        for batch in split_time(problem.batches, problem.steps)
    ]

    @partial(jax.jit, donate_argnums=0)
    @drjax.program(clients=WORKERS)
    def step(clients, batch):
        return drjax.map_fn(
            partial(local_step, problem.loss, optimizer), (clients, batch)
        )

    @partial(jax.jit, donate_argnums=(0, 1))
    @drjax.program(clients=WORKERS)
    def outer_step(server, clients):
        params, opt_state = clients
        change = drjax.map_fn(
            lambda old, new: jax.tree.map(jnp.subtract, old, new),
            (drjax.broadcast(server[0]), params),
        )
        server = outer_update(outer, server, drjax.reduce_mean(change))
        return server, (drjax.broadcast(server[0]), opt_state)

    server = init_server(problem, outer, mesh)
    with jax.set_mesh(mesh):
        clients = jax.jit(
            drjax.program(clients=WORKERS)(
                lambda params: drjax.broadcast((params, optimizer.init(params)))
            )
        )(server[0])
    held = [server, clients]

    def run() -> None:
        server, clients = held
        with jax.set_mesh(mesh):
            for i, batch in enumerate(batches, 1):
                clients, loss = step(clients, batch)
                if i % problem.period == 0:
                    server, clients = outer_step(server, clients)
        held[:] = jax.block_until_ready((server, clients))

    return run, lambda: held[0][0]


def drjax_rounds(problem: Problem) -> tuple[Callable, Callable]:
    """Sets up DiLoCo with DrJAX: one dispatch per round, a scan over local steps."""
    import drjax

    optimizer, outer = optax.sgd(problem.rate), make_outer()
    mesh = make_mesh("clients")
    batches = [
        jax.device_put(
            jax.tree.map(lambda x: np.swapaxes(x, 0, 1), batch),
            NamedSharding(mesh, P("clients")),
        )
        for batch in split_time(problem.batches, problem.rounds)
    ]

    def local(params, batches):
        inner = partial(local_step, problem.loss, optimizer)
        (new, _), losses = jax.lax.scan(
            inner, (params, optimizer.init(params)), batches
        )
        return jax.tree.map(jnp.subtract, params, new), losses

    @drjax.program(clients=WORKERS)
    def one_round(server, batches):
        change, losses = drjax.map_fn(local, (drjax.broadcast(server[0]), batches))
        return outer_update(outer, server, drjax.reduce_mean(change)), losses

    call = jax.jit(one_round, donate_argnums=0)
    start = init_server(problem, outer, mesh)
    step, params = continue_from(call, start, batches, lambda server: server[0])

    def step_on_mesh() -> None:
        with jax.set_mesh(mesh):
            step()

    return step_on_mesh, params


def local_step(loss, optimizer, state, batch):
    """Runs one step of the inner optimizer."""
    params, opt_state = state
    value, grad = jax.value_and_grad(loss)(params, batch)
    updates, opt_state = optimizer.update(grad, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value


def outer_update(outer, server, change):
    """Applies the outer optimizer to the mean change of the clients."""
    params, opt_state = server
    updates, opt_state = outer.update(change, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def init_server(
    problem: Problem, outer: optax.GradientTransformation, mesh: Mesh
) -> tuple:
    """Returns parameters and optimizer state of the server."""
    params = jax.tree.map(jnp.array, problem.params)
    server = params, outer.init(params)
    return jax.device_put(server, NamedSharding(mesh, P()))


def continue_from(
    call: Callable, state: object, batches: list, params_of: Callable
) -> tuple[Callable, Callable]:
    """Returns `step` and `params` of a loop over the batches."""
    held = [state]
    stepper = make_stepper(call, held, batches)
    return lambda: jax.block_until_ready(stepper()), lambda: params_of(held[0])
