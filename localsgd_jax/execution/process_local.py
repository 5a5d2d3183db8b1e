"""Process-local execution: only the synchronisation is a global program.

Each process compiles and runs the local steps of its own workers.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from localsgd_jax.core.pytrees import is_key, promote
from localsgd_jax.core.types import Algorithm, Cluster, PyTree, State
from localsgd_jax.core.validation import (
    check_choice,
    check_int,
    check_state,
    check_type,
)
from localsgd_jax.distributed.meshes import submesh
from localsgd_jax.execution.ambient_mesh import without_mesh
from localsgd_jax.execution.batches import check_spec_types
from localsgd_jax.execution.layout import Layout, check_mesh_axes
from localsgd_jax.execution.partition_metadata import shard_params
from localsgd_jax.execution.placement import on_mesh, simulate
from localsgd_jax.execution.process_programs import (
    ProcessPrograms,
    SubCluster,
)
from localsgd_jax.execution.replication import fold_in_workers, init_state


class ProcessCluster(NamedTuple):
    """Functions of K workers with process-local programs for local steps.

    Attributes:
      local: cluster of the workers of this process; its functions involve no other
        process.
      num_workers: K, over all processes.
      init: `init(params) -> state` of the workers of this process, with the values
        that `on_mesh(...).init(params)` gives them. No other process participates.
      local_steps: `local_steps(state, batches) -> (state, metrics)`; local steps of the
        workers of this process, leaves `(H, K_local, B, ...)` in, `(H, K_local, ...)`
        out. Never communicates; does not donate.
      sync: `sync(state, report=(), devices=None, weighted=False) -> (state, reports)`;
        synchronises all processes, or the processes of `devices`, each of which must
        call it. `report`, `(M,)` floats, is gathered with it: `reports`, `(N, M)`, has
        a row per participating process. With `weighted` the first entry of a report is
        the weight of each worker of its process. All processes must call it in the
        same order, with reports of one length and the same `weighted`. Blocks until
        the synchronisation is done, without a timeout.
      mean: `mean(tree, devices=None) -> tree`; x̄ = (1/K) Σₖ xₖ of leaves
        `(K_local, ...)`, computed as `consensus` does, over the workers of all
        processes or of the processes of `devices`.
      mean_cluster: cluster with one worker in this process, for the mean model; the
        worker is on as many devices as a worker of `local`.
      replicate: `replicate(state, like=None) -> state`; initialises the workers of this
        process from a state of `mean_cluster`. The workers are sharded as in that
        state, or as in `like`, a state from `init`.
      bytes_sent: as in `Cluster`, for one worker of the K.
      first_local_worker: global index of the first worker of this process.
      worker_process: process index of each worker, `(K,)`.
      devices: devices of all processes, in the order of the mesh.
    """

    local: Cluster
    num_workers: int
    init: Callable[[PyTree], State]
    local_steps: Callable[[State, PyTree], tuple[State, PyTree]]
    sync: Callable[..., tuple[State, np.ndarray]]
    mean: Callable[..., PyTree]
    mean_cluster: Cluster
    replicate: Callable[..., State]
    bytes_sent: Callable[..., tuple[int, int]]
    first_local_worker: int
    worker_process: tuple[int, ...]
    devices: tuple


def on_processes(
    algorithm: Algorithm,
    mesh: Mesh,
    workers: int | None = None,
    *,
    axis: str | Sequence[str] = "worker",
    worker_map: str | None = None,
    batch_spec: PyTree = None,
) -> ProcessCluster:
    """Distributes workers over processes with independent local steps.

    `on_mesh` runs one program on all processes, local steps included, so all processes
    advance in lockstep. Here only the synchronisation is a global program. A process
    can therefore

    - compute during a synchronisation (`submit_daemon`, `merge_late_sync`), also on
      CPUs, where a program does not overlap computation with collectives;
    - take fewer local steps than other processes;
    - continue with the live processes after a failure (`fault_tolerance.train`).

    The state holds the workers of this process. Its arrays are reinterpreted as shards
    of global arrays for a synchronisation, and back, without copying.

    Args:
      algorithm: per-worker algorithm, from `local_sgd` or `from_train_step`.
      mesh: mesh over the devices of all processes. Each position along the outermost
        worker axis belongs to one process, and the positions of a process are
        contiguous, as `worker_mesh` arranges them.
      workers: K, a multiple of the number of positions; None for one per position.
      axis: as in `on_mesh`.
      worker_map: as in `on_mesh`.
      batch_spec: as in `on_mesh`, for `local.shard_batch`.

    Returns:
      The functions for this process.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if a position has devices of several processes, the positions of a
        process are not contiguous, or K is no multiple of the positions.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5))
      >>> mesh = jax.make_mesh((1,), ("worker",), devices=jax.devices()[:1])
      >>> cluster = on_processes(algorithm, mesh, workers=2)
      >>> batches = np.array([[1.0, 3.0]], np.float32)             # H = 1, K_local = 2
      >>> state, metrics = cluster.local_steps(cluster.init(jnp.zeros(())), batches)
      >>> state, reports = cluster.sync(state, report=[1.0])
      >>> state.workers.params
      Array([2., 2.], dtype=float32)
    """
    axes = check_mesh_axes("on_processes", mesh, axis)
    check_type("on_processes(algorithm)", "algorithm", algorithm, Algorithm)
    check_spec_types("on_processes(batch_spec)", batch_spec)
    if workers is not None:
        workers = check_int("on_processes(workers)", "workers", workers, 1)
    if worker_map is not None:
        choices = ("vmap", "map")
        check_choice("on_processes(worker_map)", "worker_map", worker_map, choices)
    make_cluster = partial(
        on_mesh, algorithm, axis=axis, worker_map=worker_map, batch_spec=batch_spec
    )
    global_cluster = make_cluster(mesh, workers)
    workers_per_position = global_cluster.num_workers // make_cluster(mesh).num_workers

    @cache
    def sub_cluster(devices: tuple) -> SubCluster:
        sub_mesh = submesh(mesh, devices, axis)
        count = workers_per_position * make_cluster(sub_mesh).num_workers
        return SubCluster(sub_mesh, make_cluster(sub_mesh, count), axes)

    devices = tuple(mesh.devices.flat)
    positions = sub_cluster(devices).process_of_position
    worker_process = np.repeat(positions, global_cluster.num_workers // len(positions))
    local = sub_cluster(tuple(d for d in devices if d in jax.local_devices()))
    local_layout = Layout.on_mesh(local.mesh, axes, workers_per_position)
    programs = ProcessPrograms(sub_cluster, local)
    first = int(np.argmax(worker_process == jax.process_index()))
    return ProcessCluster(
        local=local.cluster,
        num_workers=global_cluster.num_workers,
        init=without_mesh(
            partial(_init, algorithm, local_layout, global_cluster.num_workers, first)
        ),
        local_steps=without_mesh(programs.local_steps),
        sync=without_mesh(partial(_sync, programs, devices)),
        mean=without_mesh(partial(_mean, programs, devices)),
        mean_cluster=_mean_cluster(algorithm, local_layout),
        replicate=without_mesh(partial(_replicate, local_layout, first)),
        bytes_sent=global_cluster.bytes_sent,
        first_local_worker=first,
        worker_process=tuple(worker_process.tolist()),
        devices=devices,
    )


@jax.jit
def merge_late_sync(synced: State, current: State, snapshot: State) -> State:
    """Adds the local progress made since the snapshot to the synchronised state.

        xₖ ← syncedₖ + (xₖ − snapshotₖ)

    `overlap(rule)` follows the same equation. Values that the synchronisation did not
    change, such as other fields and integers, are taken from `current` bit by bit.

    Args:
      synced: result of the synchronisation of `snapshot`.
      current: result of the local steps taken from `snapshot` in the meantime.
      snapshot: the state that was passed to the synchronisation.

    Returns:
      The merged state.

    Example:
      >>> import jax.numpy as jnp
      >>> def state(x):
      ...     return State(jnp.int32(0), jnp.int32(0), jnp.array([x]), (), ())
      >>> merge_late_sync(state(2.0), state(4.5), state(3.0)).workers
      Array([3.5], dtype=float32)
    """

    def merge(a: jax.Array, x: jax.Array, s: jax.Array) -> jax.Array:
        if is_key(x):
            return x
        merged = a
        if jnp.issubdtype(x.dtype, jnp.inexact):
            merged = (promote(a) + (promote(x) - promote(s))).astype(x.dtype)
        return jnp.where(a == s, x, merged)

    workers = jax.tree.map(merge, synced.workers, current.workers, snapshot.workers)
    return synced._replace(step=current.step, workers=workers)


def _sync(
    programs: ProcessPrograms,
    all_devices: tuple,
    state: State,
    report: Sequence[float] | np.ndarray = (),
    devices: Sequence | None = None,
    weighted: bool = False,
) -> tuple[State, np.ndarray]:
    """Synchronises the processes of `devices`, or all processes."""
    check_state("sync(state)", state)
    if weighted:
        _check_weight(report)
    group = _participants("sync", programs.local, all_devices, devices)
    return programs.sync(group, state, report, weighted)


def _mean(
    programs: ProcessPrograms,
    all_devices: tuple,
    tree: PyTree,
    devices: Sequence | None = None,
) -> PyTree:
    """Averages over the workers of `devices`, or over all workers."""
    group = _participants("mean", programs.local, all_devices, devices)
    return programs.mean(group, tree)


def _participants(
    call: str, local: SubCluster, all_devices: tuple, devices: Sequence | None
) -> tuple:
    """Returns the participating devices; raises if they exclude this process."""
    if devices is not None:
        check_type(f"{call}(devices)", "devices", devices, Iterable)
    group = all_devices if devices is None else tuple(devices)
    if not set(local.mesh.devices.flat) <= set(group):
        raise ValueError(
            f"{call}(devices): the devices of this process must be included, got "
            f"devices of the processes {sorted({d.process_index for d in group})}"
        )
    return group


def _check_weight(report: Sequence[float] | np.ndarray) -> None:
    """Raises unless the first entry of a report is a valid weight."""
    weight = np.asarray(report, np.float32)[:1]
    if not (weight.size and np.isfinite(weight) and weight >= 0):
        raise ValueError(
            "sync(weighted): the first entry of the report must be a weight, finite "
            f"and not negative, got {list(report)}"
        )


def _mean_cluster(algorithm: Algorithm, local: Layout) -> Cluster:
    """Creates a cluster of one worker, sharded like the workers of this process."""
    if local.mesh is None or not local.inner_axes:
        return simulate(algorithm, 1, axis=local.names[-1])
    first_position = tuple(
        slice(0, 1) if name in local.axes else slice(None)
        for name in local.mesh.axis_names
    )
    mesh = Mesh(local.mesh.devices[first_position], local.mesh.axis_names)
    return on_mesh(algorithm, mesh, axis=local.names)


def _init(
    algorithm: Algorithm, local: Layout, workers: int, first: int, params: PyTree
) -> State:
    """Initialises the local workers as workers `first`, `first` + 1, … of K."""
    params = shard_params(algorithm, local, params)
    return init_state(algorithm, local, params, first=first, num_workers=workers)


def _replicate(
    local: Layout, first: int, single: State, like: State | None = None
) -> State:
    """Replicates the state of one worker over the local workers.

        xₖ ← x

    Worker 0 keeps its PRNG keys; every other worker folds its index into them.
    """
    indices = first + jnp.arange(local.num_workers)

    def replicate_leaf(x: jax.Array) -> jax.Array:
        row = x[0]
        if is_key(row):
            is_first = (indices == 0).reshape(-1, *(1,) * row.ndim)
            return jnp.where(is_first, row[None], fold_in_workers(row, indices))
        return jnp.broadcast_to(row, (len(indices), *row.shape))

    def replicate(single: State) -> State:
        rows = partial(jax.tree.map, replicate_leaf)
        return single._replace(workers=rows(single.workers), local=rows(single.local))

    single = single._replace(specs=(like or single).specs)
    placed = jax.device_put(single, local.state_shardings(single, rows=None))
    return jax.jit(replicate, out_shardings=local.state_shardings(single))(placed)
