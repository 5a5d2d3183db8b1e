"""Local computation of a learner: training steps on its own devices."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from localsgd_jax.asynchronous.state import get_shared_field
from localsgd_jax.core import train_state
from localsgd_jax.core.metrics import metrics_by_name
from localsgd_jax.core.pytrees import is_key, stack_leaves
from localsgd_jax.core.types import Cluster, PyTree, State
from localsgd_jax.core.validation import check_type, check_worker_axis
from localsgd_jax.decoupled.job import Job
from localsgd_jax.distributed import arrays
from localsgd_jax.execution.mean_model import consensus


class Trainer(NamedTuple):
    """Functions of the workers of one learner.

    Attributes:
      init: `init(learner) -> state`, from the parameters of the job.
      steps: `steps(state, batches) -> (state, metrics)`, with a list of batches with
        leaves `(K, B, ...)`; the metrics are arrays `(H, ...)` by name.
      read: `read(state) -> params`, the field of the train state that is sent.
      write: `write(state, params) -> state`.
    """

    init: Callable[[int], PyTree]
    steps: Callable[[PyTree, list], tuple[PyTree, dict[str, jax.Array]]]
    read: Callable[[PyTree], PyTree]
    write: Callable[[PyTree, PyTree], PyTree]


def make_trainer(job: Job) -> Trainer:
    """Makes the functions of a learner: of one worker, or of the cluster of the job."""
    if job.cluster is None:
        return _single_worker(job)
    cluster = job.cluster(job.algorithm)
    check_type("Job(cluster)", "its result", cluster, Cluster)
    return _cluster(job, cluster)


def _single_worker(job: Job) -> Trainer:
    """Makes a learner with one worker; a batch has one row."""

    def init(learner: int) -> PyTree:
        worker = job.algorithm.init(job.params)[0]
        return jax.tree.map(lambda x: _own_key(jnp.asarray(x), learner), worker)

    @jax.jit
    def scan(worker: PyTree, batches: PyTree) -> tuple[PyTree, PyTree]:
        return jax.lax.scan(job.algorithm.step, worker, batches)

    def steps(worker: PyTree, batches: list) -> tuple[PyTree, dict[str, jax.Array]]:
        for batch in batches:
            check_worker_axis("Job(batches)", batch, 1)
        rows = [jax.tree.map(lambda leaf: leaf[0], batch) for batch in batches]
        worker, metrics = scan(worker, stack_leaves(*rows))
        return worker, metrics_by_name(metrics, 1)

    def write(worker: PyTree, params: PyTree) -> PyTree:
        return train_state.replace_fields(worker, {job.field: params})

    return Trainer(init, steps, lambda w: get_shared_field(w, job.field), write)


def _cluster(job: Job, cluster: Cluster) -> Trainer:
    """Makes a learner of several workers, synchronised before each contribution."""

    def mean_over_row(x: jax.Array) -> jax.Array:
        return arrays.local_replica(_mean_of_workers(x))

    def steps(state: State, batches: list) -> tuple[State, dict[str, jax.Array]]:
        collected = []
        for batch in batches:
            state, metrics = cluster.step(state, cluster.shard_batch(batch))
            collected.append(metrics)
        state = cluster.sync(state)
        metrics = metrics_by_name(stack_leaves(*collected), 2)
        return state, {name: mean_over_row(x) for name, x in metrics.items()}

    def write(state: State, params: PyTree) -> State:
        rows = get_shared_field(state.workers, job.field)
        rows = jax.tree.map(_broadcast, params, rows)
        workers = train_state.replace_fields(state.workers, {job.field: rows})
        return state._replace(workers=workers)

    return Trainer(
        lambda learner: cluster.init(job.params),
        steps,
        lambda state: consensus(state, job.field),
        write,
    )


def _own_key(leaf: jax.Array, learner: int) -> jax.Array:
    """Folds the index of a learner into typed PRNG keys."""
    if not is_key(leaf):
        return leaf
    return jax.vmap(lambda key: jax.random.fold_in(key, learner))(
        leaf.reshape(-1)
    ).reshape(leaf.shape)


def _broadcast(params: jax.Array, rows: jax.Array) -> jax.Array:
    """Repeats parameters for each worker, with the sharding of the workers."""
    repeated = np.broadcast_to(np.asarray(params, rows.dtype), rows.shape)
    return arrays.device_put_global(repeated, rows.sharding)


def _mean_of_workers(x: jax.Array) -> jax.Array:
    """Returns means over workers, `(H, K)` to `(H,)`, with a copy on every device."""
    mean = functools.partial(jnp.mean, axis=1)
    if not isinstance(x.sharding, NamedSharding):
        return mean(x)
    return jax.jit(mean, out_shardings=NamedSharding(x.sharding.mesh, P()))(x)
