"""Contestants in JAX, on two devices of this process.

Each is made from a problem and returns a turn, which goes on from where the last turn
ended and waits for its end, and a look at the parameters.
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
from benchmarks.peers.problem import WORKERS, Problem

OUTER = partial(optax.sgd, 0.7, momentum=0.9, nesterov=True)


def grid(name: str) -> Mesh:
    return Mesh(jax.devices()[:WORKERS], (name,), axis_types=(AxisType.Auto,))


def cluster(problem: Problem, rule: lsgd.SyncRule) -> lsgd.Cluster:
    algorithm = lsgd.local_sgd(problem.loss, optax.sgd(problem.rate), rule)
    return lsgd.on_mesh(algorithm, grid("worker"))


def each(batches: tuple, count: int) -> list[tuple]:
    """Cuts (T, ...) into `count` pieces."""
    columns = (np.split(x, count) for x in batches)
    return [*zip(*columns, strict=True)]


def fused(problem: Problem, rule: lsgd.SyncRule) -> tuple[Callable, Callable]:
    """The library, a round in a dispatch."""
    place = cluster(problem, rule)
    one_round = jax.jit(lsgd.fused(place), donate_argnums=0)
    batches = [place.put(x, time=True) for x in each(problem.batches, problem.rounds)]
    return going_on(one_round, place.init(problem.params), batches, lsgd.consensus)


def gated(
    problem: Problem, rule: lsgd.SyncRule, period: int | None = None
) -> tuple[Callable, Callable]:
    """The library, a step in a dispatch."""
    place = cluster(problem, rule)
    step = lsgd.gated(place, lsgd.every(period or problem.period))
    batches = [
        place.put(jax.tree.map(lambda x: x[0], batch))
        for batch in each(problem.batches, problem.steps)
    ]
    call = jax.jit(step, donate_argnums=0)
    return going_on(call, place.init(problem.params), batches, lsgd.consensus)


def driven(problem: Problem, rule: lsgd.SyncRule) -> tuple[Callable, Callable]:
    """The library's `train`, which stacks and sends NumPy batches itself."""
    place = cluster(problem, rule)
    batches = [
        jax.tree.map(lambda x: x[0], batch)
        for batch in each(problem.batches, problem.steps)
    ]
    held = [place.init(problem.params)]

    def turn() -> None:
        held[0], _ = lsgd.train(
            place, held[0], batches, every=problem.period, progress=False
        )
        jax.block_until_ready(held[0])

    return turn, lambda: lsgd.consensus(held[0])


def data_parallel(problem: Problem) -> tuple[Callable, Callable]:
    """Plain JAX: the gradient of the whole batch in every step, jitted, donated."""
    mesh, optimizer = grid("data"), optax.sgd(problem.rate)

    def step(state, batch):
        params, opt_state = state
        loss, grad = jax.value_and_grad(problem.loss)(params, batch)
        updates, opt_state = optimizer.update(grad, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    split = NamedSharding(mesh, P("data"))
    batches = [
        jax.device_put(jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), x), split)
        for x in each(problem.batches, problem.steps)
    ]
    start = problem.params, optimizer.init(problem.params)
    start = jax.device_put(jax.tree.map(jnp.array, start), NamedSharding(mesh, P()))
    call = jax.jit(step, donate_argnums=0)
    return going_on(call, start, batches, lambda state: state[0])


def drjax_steps(problem: Problem) -> tuple[Callable, Callable]:
    """DiLoCo with DrJAX, a jitted program for a step and one for the outer step."""
    import drjax

    optimizer, outer = optax.sgd(problem.rate), OUTER()
    mesh = grid("clients")
    batches = [
        jax.device_put(
            jax.tree.map(lambda x: x[0], batch), NamedSharding(mesh, P("clients"))
        )
        for batch in each(problem.batches, problem.steps)
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

    server = begin(problem, outer, mesh)
    with jax.set_mesh(mesh):
        clients = jax.jit(
            drjax.program(clients=WORKERS)(
                lambda params: drjax.broadcast((params, optimizer.init(params)))
            )
        )(server[0])
    held = [server, clients]

    def turn() -> None:
        server, clients = held
        with jax.set_mesh(mesh):
            for i, batch in enumerate(batches, 1):
                clients, loss = step(clients, batch)
                if i % problem.period == 0:
                    server, clients = outer_step(server, clients)
        held[:] = jax.block_until_ready((server, clients))

    return turn, lambda: held[0][0]


def drjax_rounds(problem: Problem) -> tuple[Callable, Callable]:
    """DiLoCo with DrJAX, a round in a dispatch: a scan within what is mapped."""
    import drjax

    optimizer, outer = optax.sgd(problem.rate), OUTER()
    mesh = grid("clients")
    batches = [
        jax.device_put(
            jax.tree.map(lambda x: np.swapaxes(x, 0, 1), batch),
            NamedSharding(mesh, P("clients")),
        )
        for batch in each(problem.batches, problem.rounds)
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
    start = begin(problem, outer, mesh)
    turn, look = going_on(call, start, batches, lambda server: server[0])

    def within() -> None:
        with jax.set_mesh(mesh):
            turn()

    return within, look


def local_step(loss, optimizer, state, batch):
    params, opt_state = state
    value, grad = jax.value_and_grad(loss)(params, batch)
    updates, opt_state = optimizer.update(grad, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value


def outer_update(outer, server, change):
    params, opt_state = server
    updates, opt_state = outer.update(change, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def begin(problem: Problem, outer: optax.GradientTransformation, mesh: Mesh) -> tuple:
    """Returns the server's parameters and the state of its optimizer."""
    params = jax.tree.map(jnp.array, problem.params)
    server = params, outer.init(params)
    return jax.device_put(server, NamedSharding(mesh, P()))


def going_on(
    call: Callable, state: object, batches: list, look: Callable
) -> tuple[Callable, Callable]:
    """A loop over the batches that goes on from the state that it left."""
    held = [state]

    def turn() -> None:
        state = held[0]
        for batch in batches:
            state, metrics = call(state, batch)
        held[0], _ = jax.block_until_ready((state, metrics))

    return turn, lambda: look(held[0])
