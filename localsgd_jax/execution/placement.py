"""Device placement of workers: simulation on one device, and meshes.

The only module that uses shard_map and, with `lanes` and `replication`, vmap over
workers.
"""

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from localsgd_jax.analysis import jaxpr_bytes_sent
from localsgd_jax.core import pytrees, validation
from localsgd_jax.core.types import (
    Algorithm,
    Cluster,
    PyTree,
    RuleState,
    State,
    SyncContext,
)
from localsgd_jax.distributed import arrays, coordination
from localsgd_jax.execution.ambient_mesh import explain_automatic_axes, in_mesh
from localsgd_jax.execution.batches import check_batch_spec, shard_batch
from localsgd_jax.execution.convolutions import is_cpu
from localsgd_jax.execution.cpu_threads import warn_about_threads
from localsgd_jax.execution.lanes import map_step
from localsgd_jax.execution.layout import Layout, as_tuple, check_mesh_axes
from localsgd_jax.execution.local_step import check_step
from localsgd_jax.execution.partition_metadata import shard_params
from localsgd_jax.execution.replication import init_state


def simulate(
    algorithm: Algorithm,
    workers: int | Sequence[int],
    *,
    axis: str | Sequence[str] = "worker",
    worker_map: str | None = None,
) -> Cluster:
    """Places all workers on one device.

    Computes the same values as `on_mesh`, without a mesh: for experiments with many
    small workers, and for tests.

    Args:
      algorithm: per-worker algorithm, from `local_sgd` or `from_train_step`.
      workers: K; for several worker axes the size of each.
      axis: name of the worker axis, or several names, outermost first.
      worker_map: how the local steps of the workers run: "vmap" batches them, "map"
        runs them one after another with `jax.lax.map`. None chooses "map" for steps
        with convolutions on CPUs, where it is faster, and "vmap" otherwise.

    Returns:
      A cluster.

    Raises:
      TypeError: if the algorithm is not an `Algorithm` or a size is not an int.
      ValueError: if a size is below 1, or sizes and names do not match.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.1))
      >>> cluster = lsgd.simulate(algorithm, workers=1024)
      >>> cluster.init(jnp.zeros(())).workers.params.shape
      (1024,)
    """
    names = validation.check_names("simulate(axis)", "axis", axis)
    sizes = as_tuple(workers)
    if len(names) != len(sizes) or len(set(names)) != len(names):
        raise ValueError(
            "simulate(workers, axis): distinct axis names with one size each are "
            f"required, got {workers!r} for {axis!r}"
        )
    call, name = "simulate(workers)", "the number of workers"
    sizes = tuple(validation.check_int(call, name, size, 1) for size in sizes)
    _check_algorithm("simulate", algorithm, worker_map)
    return _build_cluster(algorithm, Layout.on_device(names, sizes), worker_map)


def on_mesh(
    algorithm: Algorithm,
    mesh: Mesh,
    workers: int | None = None,
    *,
    axis: str | Sequence[str] = "worker",
    worker_map: str | None = None,
    batch_spec: PyTree = None,
) -> Cluster:
    """Distributes workers over the devices of a mesh.

    Mesh axes that are not worker axes stay automatic: parameters that are sharded over
    them when passed to `init` stay sharded within every worker, and a synchronisation
    communicates only the shard of each device.

    Args:
      algorithm: per-worker algorithm, from `local_sgd` or `from_train_step`.
      mesh: any mesh; its axes are used as automatic ones.
      workers: K, a multiple of the number of positions along the worker axes; None
        for one worker per position. Workers that share a position are its lanes.
      axis: mesh axis over which the workers are distributed, or several, outermost
        first. Lanes extend the last one.
      worker_map: how the local steps of the lanes of a position run: "vmap" batches
        them, "map" runs them one after another with `jax.lax.map`. None chooses "map"
        for steps with convolutions on CPUs, where it is faster, and "vmap" otherwise.
      batch_spec: layout of host batches inside a worker: the `PartitionSpec` of a leaf
        `(B, ...)` of the batch of one worker over the inner axes, or a pytree prefix
        of such specs, as `in_shardings` of `jax.jit`. None splits B over the inner
        axes "data" and "fsdp" of the mesh if their sizes divide it, and nothing else;
        `PartitionSpec()` splits nothing. Leaves `(K,)` are not split. A batch that is
        on the mesh already keeps its layout.

    Returns:
      A cluster.

    Warns:
      RuntimeWarning: before JAX 0.12, if the process has fewer than two threads for
        each of its CPU devices; a loop over `gated` or `fused` may then abort.

    Raises:
      TypeError: if the algorithm is not an `Algorithm`, the mesh is not a `Mesh`, or a
        batch spec is not a `PartitionSpec`.
      ValueError: if the mesh lacks an axis, K is no multiple of the positions, or a
        batch spec names an axis that is not inside a worker.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.1))
      >>> mesh = jax.make_mesh((jax.device_count(),), ("worker",))
      >>> cluster = lsgd.on_mesh(algorithm, mesh, workers=2 * jax.device_count())
    """
    names = check_mesh_axes("on_mesh", mesh, axis)
    _check_algorithm("on_mesh", algorithm, worker_map)
    positions = math.prod(mesh.shape[name] for name in names)
    workers = positions if workers is None else workers
    call, name = "on_mesh(workers)", "the number of workers"
    workers = validation.check_int(call, name, workers, 1)
    if workers % positions:
        raise ValueError(
            f"on_mesh(workers): workers must be a multiple of the {positions} "
            f"positions on the mesh axes {names}, got {workers}"
        )
    warn_about_threads(mesh)
    layout = Layout.on_mesh(mesh, names, lanes=workers // positions)
    return _build_cluster(algorithm, layout, worker_map, batch_spec)


def _build_cluster(
    algorithm: Algorithm,
    layout: Layout,
    worker_map: str | None,
    batch_spec: PyTree = None,
) -> Cluster:
    """Builds the functions of K workers from the functions of one worker."""
    count, batch_spec = layout.num_workers, check_batch_spec(layout, batch_spec)
    on_cpu, mesh_axes = is_cpu(layout.mesh), layout.axes if layout.mesh else ()
    one_step = check_step(algorithm.step, mesh_axes, on_cpu)
    step = map_step(one_step, worker_map, layout.workers_per_position, on_cpu)
    if layout.mesh is not None:
        step = _shard_map_step(layout, explain_automatic_axes(step))
    run_sync = jax.jit(partial(_run_sync, algorithm, layout))
    run_sync_if = jax.jit(partial(_run_sync_if, algorithm, layout))

    # State and weights are checked outside jit, where buffers and values are known.
    def checked_sync(state: State, weight: jax.Array | None = None) -> State:
        validation.check_state("sync(state)", state)
        return run_sync(state, validation.check_weights(weight, count))

    def checked_sync_if(
        due: jax.Array | bool, state: State, weight: jax.Array | None = None
    ) -> State:
        validation.check_state("sync_if(state)", state)
        return run_sync_if(due, state, validation.check_weights(weight, count))

    cluster = Cluster(
        init=partial(_init, algorithm, layout),
        step=_explain_arguments(jax.jit(partial(_run_step, step, layout))),
        sync=checked_sync,
        num_workers=count,
        shard_batch=partial(shard_batch, layout, batch_spec),
        bytes_sent=partial(_bytes_sent, algorithm, layout),
        algorithm=algorithm,
        sync_if=checked_sync_if,
    )
    return cluster if layout.mesh is None else in_mesh(layout.mesh, cluster)


def _explain_arguments(run_step: Callable) -> Callable:
    """Adds messages about wrong arguments to a compiled step.

    They are checked after an error only, so that a step has no overhead.
    """

    @functools.wraps(run_step)
    def step(state: State, batch: PyTree) -> tuple[State, PyTree]:
        try:
            return run_step(state, batch)
        except (TypeError, AttributeError, RuntimeError):
            validation.check_state("step(state)", state)
            validation.check_array_leaves("step(batch)", "batch", batch)
            validation.check_not_donated("step(batch)", "batch", batch)
            raise

    return step


def _init(
    algorithm: Algorithm, layout: Layout, params: PyTree | Callable[[], PyTree]
) -> State:
    """Initialises the state, after comparing the configuration of all processes."""
    mesh, make_params = layout.mesh, None
    if not callable(params):
        validation.check_array_leaves("init(params)", "params", params)
        validation.check_not_donated("init(params)", "params", params)
    if callable(params):
        if mesh is None:
            params = params()
        else:
            make_params, params = params, _abstract_result(params)
    if mesh is not None and mesh.is_multi_process and not pytrees.is_abstract(params):
        fingerprint = {
            "workers": layout.num_workers,
            "mesh": dict(mesh.shape),
            "rule": dict(algorithm.rule_names),
            "optimizer": algorithm.optimizer_name,
            "params": arrays.describe_leaves(params),
        }
        holders = arrays.processes_of(NamedSharding(mesh, P()))
        coordination.assert_equal_across_processes("init(params)", fingerprint, holders)
    params = shard_params(algorithm, layout, params)
    return init_state(algorithm, layout, params, make_params=make_params)


def _abstract_result(make_params: Callable[[], PyTree]) -> PyTree:
    """Returns the shapes of new parameters, with the shardings of a jitted function."""
    if not hasattr(make_params, "lower"):
        return jax.eval_shape(make_params)
    compiled = cast(Any, make_params).lower().compile()
    shapes = jax.eval_shape(make_params)
    return pytrees.with_shardings(shapes, compiled.output_shardings)


def _run_step(
    step: Callable, layout: Layout, state: State, batch: PyTree
) -> tuple[State, PyTree]:
    """Takes one local step of all workers and increments the step counter."""
    validation.check_type("step(state)", "state", state, State)
    validation.check_worker_axis("step(state, batch)", batch, layout.num_workers)
    workers, metrics = step(state.workers, batch)
    state = state._replace(step=state.step + 1, workers=workers)
    return layout.constrain(state), metrics


def _run_sync(
    algorithm: Algorithm, layout: Layout, state: State, weight: jax.Array | None
) -> State:
    """Synchronises all workers and increments the round counter."""
    sync = _vmap_sync(algorithm.sync, layout, _worker_specs(state))
    number = state.round + 1
    workers, local, shared = _shard_map_sync(layout, sync)(
        state.workers, state.local, state.shared, number, weight
    )
    return layout.constrain(
        State(state.step, number, workers, local, shared, state.specs)
    )


def _run_sync_if(
    algorithm: Algorithm,
    layout: Layout,
    due: jax.Array,
    state: State,
    weight: jax.Array | None,
) -> State:
    """Synchronises all workers and increments the round counter if due."""
    sync = _vmap_sync(algorithm.sync, layout, _worker_specs(state))

    # The conditional is inside the shard_map: around it, the GPU compiler of JAX 0.11
    # gathers the outputs of both branches, whether the round is due or not.
    def sync_if(workers, local, shared, due, number, weight):
        return jax.lax.cond(
            due,
            lambda operands: sync(*operands, number, weight),
            lambda operands: operands,
            (workers, local, shared),
        )

    number = state.round + jnp.asarray(due, jnp.int32)
    workers, local, shared = _shard_map_sync(layout, sync_if)(
        state.workers, state.local, state.shared, due, number, weight
    )
    return layout.constrain(
        State(state.step, number, workers, local, shared, state.specs)
    )


def _worker_specs(state: State) -> PyTree | None:
    """Returns the partition of the train state of one worker, as a tree."""
    if state.specs is None:
        return None
    return jax.tree.structure(state.workers).unflatten(state.specs.workers)


def _bytes_sent(
    algorithm: Algorithm, layout: Layout, state: State, round: int | None = None
) -> tuple[int, int]:
    """Returns minimum and maximum bytes sent by one worker in a round.

    They are counted as if each worker had a device of its own.
    """
    shapes = jax.eval_shape(lambda state: state, state)
    worker, local = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
        (shapes.workers, shapes.local),
    )
    carriers = {name: (name,) for name in layout.axes}

    def traced_sync(worker, local, shared, traced_round):
        number = traced_round if round is None else round
        context = SyncContext(carriers, number, specs=_worker_specs(state))
        with layout.ambient_inner():
            return algorithm.sync(worker, RuleState(shared, local), context)

    return jaxpr_bytes_sent(
        traced_sync, layout.axes, worker, local, shapes.shared, shapes.round
    )


def _vmap_sync(sync: Callable, layout: Layout, specs: PyTree | None) -> Callable:
    """Maps the synchronisation of one worker over the lanes of a position."""
    carriers = layout.carriers

    def sync_one(worker, local, shared, round_number, weight):
        context = SyncContext(carriers, round_number, weight, specs)
        worker, state = sync(worker, RuleState(shared, local), context)
        return worker, state.local, state.shared

    mapped = sync_one
    for name, size in reversed(list(layout.lanes.items())):
        # out_axes=None raises if the shared state depends on a single worker.
        mapped = jax.vmap(
            mapped,
            in_axes=(0, 0, None, None, 0),
            out_axes=(0, 0, None),
            axis_name=name,
            axis_size=size,
        )

    def sync_position(workers, local, shared, round_number, weight):
        workers, local, weight = layout.split((workers, local, weight))
        try:
            workers, local, shared = mapped(
                workers, local, shared, round_number, weight
            )
        except ValueError as error:
            if "out_axes" not in str(error):
                raise
            raise ValueError(
                "rule: RuleState.shared must not depend on per-worker values; compute "
                "it from reduced values and from itself"
            ) from error
        return layout.join(workers), layout.join(local), shared

    return sync_position


def _shard_map_step(layout: Layout, step: Callable) -> Callable:
    """Runs the step of a position at each position of the mesh."""
    split = P(layout.names)
    return _shard_map(layout)(step, in_specs=(split, split), out_specs=(split, split))


def _shard_map_sync(layout: Layout, sync: Callable) -> Callable:
    """Runs the synchronisation of a position at each position of the mesh.

    Args:
      layout: positions of the workers.
      sync: `sync(workers, local, shared, *scalars, weight) -> (workers, local,
        shared)`.

    Returns:
      A function of the same arguments, for the workers of all positions.
    """
    if layout.mesh is None:
        return sync
    split, replicated = P(layout.names), P()
    state_specs = (split, split, replicated)

    def mapped(workers, local, shared, *scalars_and_weight):
        *scalars, weight = scalars_and_weight
        specs = (*state_specs, *(replicated,) * len(scalars), split)
        return _shard_map(layout)(sync, in_specs=specs, out_specs=state_specs)(
            workers, local, shared, *scalars, weight
        )

    return mapped


def _shard_map(layout: Layout) -> Callable:
    """Returns `jax.shard_map` over the worker axes of the mesh."""
    # Varying-axes checks are off: every value inside is a worker's own copy or is
    # reduced by the rule, so the checks would find nothing. With them, gradients with
    # respect to replicated values would be summed over workers, and a cond around a
    # pmean would not type-check.
    return partial(
        jax.shard_map, mesh=layout.mesh, axis_names=set(layout.axes), check_vma=False
    )


def _check_algorithm(call: str, algorithm: Algorithm, worker_map: str | None) -> None:
    """Raises unless the arguments are an algorithm and a way to map its step."""
    validation.check_type(f"{call}(algorithm)", "algorithm", algorithm, Algorithm)
    if worker_map is not None:
        choices, argument = ("vmap", "map"), f"{call}(worker_map)"
        validation.check_choice(argument, "worker_map", worker_map, choices)
