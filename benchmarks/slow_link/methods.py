"""How workers agree: each method as rounds that processes take together.

Everything that is sent at a time is sent as one vector.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from benchmarks.models import Model
from localsgd_jax.apart import apart, catch_up, in_background


def average() -> lsgd.SyncRule:
    return lsgd.flatten(lsgd.average())


def diloco() -> lsgd.SyncRule:
    return lsgd.flatten(lsgd.diloco())


def four_bits() -> lsgd.SyncRule:
    nesterov = optax.sgd(0.7, momentum=0.9, nesterov=True)
    return lsgd.flatten(lsgd.outer(nesterov, lsgd.quantize(lsgd.average(), 4)))


def streaming() -> lsgd.SyncRule:
    return lsgd.flatten(lsgd.fragment(lsgd.diloco(), 4, cut=0))


class Method(NamedTuple):
    """A rule, how often it is applied, and whether workers go on in the meantime.

    Attributes:
      rule: makes the rule; None: gradients are averaged at every step.
      period: local steps from one agreement to the next.
      beside: whether an agreement travels while the next steps are computed.
      bits: of each number on the wire.
      pieces: agreements until all parameters have been sent.
    """

    rule: Callable | None
    period: int
    beside: bool = False
    bits: int = 32
    pieces: int = 1


METHODS = {
    "every step": Method(None, 1),
    "Local SGD, H = 4": Method(average, 4),
    "Local SGD, H = 16": Method(average, 16),
    "Local SGD, H = 64": Method(average, 64),
    "Local SGD, H = 16, beside": Method(average, 16, beside=True),
    "Local SGD, H = 64, beside": Method(average, 64, beside=True),
    "DiLoCo, H = 32": Method(diloco, 32),
    "DiLoCo, 4 bits, H = 32": Method(four_bits, 32, bits=4),
    "streaming DiLoCo, H = 32": Method(streaming, 8, pieces=4),
    "streaming DiLoCo, H = 32, beside": Method(streaming, 8, beside=True, pieces=4),
}


class Rounds(NamedTuple):
    """A method in motion.

    Attributes:
      start: `start() -> run`.
      advance: `advance(run, batches) -> run`; a round on leaves (H, b, ...) of the
        worker here. What still travels when it returns belongs to the run.
      settle: `settle(run) -> rows`, parameters (1, ...) of the worker here; waits for
        what still travels.
      mean: `mean(rows) -> params` of the averaged model; all take part.
    """

    start: Callable[[], Any]
    advance: Callable[[Any, Any], Any]
    settle: Callable[[Any], Any]
    mean: Callable[[Any], Any]


def rounds(method: Method, model: Model, optimizer: Any, mesh: Mesh) -> Rounds:
    if method.rule is None:
        return _every_step(model, optimizer, mesh)
    algorithm = lsgd.local_sgd(model.loss, optimizer, rule=method.rule())
    mine = apart(algorithm, mesh)

    def start():
        return mine.init(model.params), None, None

    def here(batches):
        return jax.tree.map(lambda x: x[:, None], batches)

    def wait(run, batches):
        state, _ = mine.round(run[0], here(batches))
        return mine.agree(state)[0], None, None

    def go_on(run, batches):
        state, travelling, captured = run
        state, _ = jax.block_until_ready(mine.round(state, here(batches)))
        if travelling:
            agreed, _ = travelling.result(timeout=600)
            state = catch_up(agreed, state, captured)
        return state, in_background(mine.agree, state), state

    def settle(run):
        state, travelling, _ = run
        if travelling:
            state, _ = travelling.result(timeout=600)
        return state.workers.params

    return Rounds(start, go_on if method.beside else wait, settle, mine.mean)


def own(rows: Any) -> Any:
    """The model of the worker here."""
    return jax.tree.map(lambda x: x[0], rows)


def _every_step(model: Model, optimizer: Any, mesh: Mesh) -> Rounds:
    """What one does without this library: an all-reduce of gradients at each step."""
    same, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("worker"))

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("worker")),
        out_specs=P(),
        check_vma=False,
    )
    def gradient(params, batch):
        vector, unravel = ravel_pytree(jax.grad(model.loss)(params, batch))
        return unravel(jax.lax.pmean(vector, "worker"))

    @jax.jit
    def step(params, moments, batch):
        updates, moments = optimizer.update(gradient(params, batch), moments, params)
        return optax.apply_updates(params, updates), moments

    def start():
        # Every process has the same parameters: nothing needs to be compared.
        params = jax.tree.map(
            lambda x: jax.make_array_from_callback(
                x.shape, same, lambda place: np.asarray(x)[place]
            ),
            model.params,
        )
        return params, jax.jit(optimizer.init, out_shardings=same)(params)

    def advance(run, batches):
        for i in range(len(jax.tree.leaves(batches)[0])):
            batch = jax.tree.map(
                lambda x, i=i: jax.make_array_from_process_local_data(split, x[i]),
                batches,
            )
            run = jax.block_until_ready(step(*run, batch))
        return run

    def settle(run):
        return jax.tree.map(lambda x: x.addressable_data(0)[None], run[0])

    return Rounds(start, advance, settle, own)
