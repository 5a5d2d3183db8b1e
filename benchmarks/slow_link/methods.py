"""Training methods of the measurement, as rounds on two processes.

Every method sends one vector per synchronisation, also where the parameters have many
leaves.
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
from localsgd_jax.distributed.background import submit_daemon
from localsgd_jax.execution.process_local import merge_late_sync, on_processes

SYNC_TIMEOUT = 600  # Seconds.


def average() -> lsgd.SyncRule:
    """Returns the mean of the parameters."""
    return lsgd.flatten(lsgd.average())


def diloco() -> lsgd.SyncRule:
    """Returns DiLoCo in 32 bits."""
    return lsgd.flatten(lsgd.diloco())


def diloco_4_bits() -> lsgd.SyncRule:
    """Returns DiLoCo with pseudo-gradients quantised to 4 bits."""
    nesterov = optax.sgd(0.7, momentum=0.9, nesterov=True)
    return lsgd.flatten(lsgd.outer(nesterov, lsgd.quantize(lsgd.average(), 4)))


def streaming_diloco() -> lsgd.SyncRule:
    """Returns DiLoCo with one of four fragments per synchronisation."""
    return lsgd.flatten(lsgd.fragment(lsgd.diloco(), 4, split_axis=0))


class Method(NamedTuple):
    """A synchronisation rule and its schedule.

    Attributes:
      rule: constructor of the rule; None averages the gradients at every step.
      period: H, local steps per synchronisation.
      overlapped: whether the next local steps overlap with a synchronisation.
      bits: bits sent per parameter.
      fragments: synchronisations until all parameters have been sent.
    """

    rule: Callable | None
    period: int
    overlapped: bool = False
    bits: int = 32
    fragments: int = 1


OVERLAPPED_SUFFIX = ", overlapped"  # Ends the names of overlapped methods.
METHODS = {
    "every step": Method(None, 1),
    "Local SGD, H = 4": Method(average, 4),
    "Local SGD, H = 16": Method(average, 16),
    "Local SGD, H = 64": Method(average, 64),
    "Local SGD, H = 16, overlapped": Method(average, 16, overlapped=True),
    "Local SGD, H = 64, overlapped": Method(average, 64, overlapped=True),
    "DiLoCo, H = 32": Method(diloco, 32),
    "DiLoCo, 4 bits, H = 32": Method(diloco_4_bits, 32, bits=4),
    "streaming DiLoCo, H = 32": Method(streaming_diloco, 8, fragments=4),
    "streaming DiLoCo, H = 32, overlapped": Method(
        streaming_diloco, 8, overlapped=True, fragments=4
    ),
}


class MethodRunner(NamedTuple):
    """Functions that run a method on this process.

    Attributes:
      start: `start() -> run`.
      advance: `advance(run, batches) -> run`; one round on leaves `(H, B, ...)` of the
        local worker. A synchronisation may still be in flight when it returns.
      finish: `finish(run) -> params`, leaves `(1, ...)` of the local worker; waits for
        the synchronisation in flight.
      mean: `mean(params) -> params` of the averaged model; all processes must call it.
    """

    start: Callable[[], Any]
    advance: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any]
    mean: Callable[[Any], Any]


def make_runner(
    method: Method, model: Model, optimizer: Any, mesh: Mesh
) -> MethodRunner:
    """Returns the functions that run a method, with one worker per process."""
    if method.rule is None:
        return _data_parallel_runner(model, optimizer, mesh)
    algorithm = lsgd.local_sgd(model.loss, optimizer, rule=method.rule())
    cluster = on_processes(algorithm, mesh)

    def start():
        return cluster.init(model.params), None, None

    def add_worker_axis(batches):
        return jax.tree.map(lambda x: x[:, None], batches)

    def blocking_round(run, batches):
        state, _ = cluster.local_steps(run[0], add_worker_axis(batches))
        return cluster.sync(state)[0], None, None

    def overlapped_round(run, batches):
        state, in_flight, snapshot = run
        state, _ = cluster.local_steps(state, add_worker_axis(batches))
        state = jax.block_until_ready(state)
        if in_flight:
            synced, _ = in_flight.result(timeout=SYNC_TIMEOUT)
            state = merge_late_sync(synced, state, snapshot)
        return state, submit_daemon(cluster.sync, state), state

    def finish(run):
        state, in_flight, _ = run
        if in_flight:
            state, _ = in_flight.result(timeout=SYNC_TIMEOUT)
        return state.workers.params

    advance = overlapped_round if method.overlapped else blocking_round
    return MethodRunner(start, advance, finish, cluster.mean)


def local_params(params: Any) -> Any:
    """Returns the parameters of the local worker without their worker axis."""
    return jax.tree.map(lambda x: x[0], params)


def _data_parallel_runner(model: Model, optimizer: Any, mesh: Mesh) -> MethodRunner:
    """Returns a runner in plain JAX that all-reduces the gradients at every step."""
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("worker"))

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("worker")),
        out_specs=P(),
        check_vma=False,
    )
    def mean_gradient(params, batch):
        vector, unravel = ravel_pytree(jax.grad(model.loss)(params, batch))
        return unravel(jax.lax.pmean(vector, "worker"))

    @jax.jit
    def step(params, opt_state, batch):
        gradient = mean_gradient(params, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def start():
        # All processes have equal parameters; `device_put` would compare them.
        params = jax.tree.map(
            lambda x: jax.make_array_from_callback(
                x.shape, replicated, lambda index: np.asarray(x)[index]
            ),
            model.params,
        )
        return params, jax.jit(optimizer.init, out_shardings=replicated)(params)

    def advance(run, batches):
        for i in range(len(jax.tree.leaves(batches)[0])):
            batch = jax.tree.map(
                lambda x, i=i: jax.make_array_from_process_local_data(sharded, x[i]),
                batches,
            )
            run = jax.block_until_ready(step(*run, batch))
        return run

    def finish(run):
        return jax.tree.map(lambda x: x.addressable_data(0)[None], run[0])

    return MethodRunner(start, advance, finish, local_params)
