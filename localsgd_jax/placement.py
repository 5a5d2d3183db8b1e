"""Where workers live: the only file that names vmap or shard_map."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from localsgd_jax import agreement, checks, processes, shapes
from localsgd_jax.base import (
    Algorithm,
    Cluster,
    Context,
    Lane,
    PyTree,
    Rows,
    RuleState,
    State,
)
from localsgd_jax.ledger import sent_bytes
from localsgd_jax.rules.describe import describe

LANE = Lane("lane")


def simulate(
    algorithm: Algorithm,
    workers: int | Sequence[int],
    *,
    axis: str | Sequence[str] = "worker",
    lanes: str = "vmap",
) -> Cluster:
    """Puts all workers on one device.

    Gives the numbers that `on_mesh` gives, without a mesh: for experiments with many
    small workers, and for tests.

    Args:
      algorithm: what one worker does.
      workers: K; for several worker axes the size of each.
      axis: name of the worker axis, or several names, outermost first.
      lanes: how the local steps of the workers run: "vmap", batched together, or
        "map", one after another, which suits convolutions on CPUs.

    Returns:
      A cluster.

    Raises:
      ValueError: if a size is below 1, or sizes and names do not match.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.1),
      ...                            rule=lsgd.average())
      >>> cluster = lsgd.simulate(algorithm, workers=1024)
      >>> cluster.init(jnp.zeros(())).workers.params.shape
      (1024,)
    """
    names, sizes = _as_tuple(axis), _as_tuple(workers)
    if len(names) != len(sizes) or len(set(names)) != len(names):
        raise ValueError(
            f"simulate(workers, axis): one size for each of different axes, got "
            f"{workers!r} for {axis!r}"
        )
    for size in sizes:
        checks.integer("simulate(workers)", "a number of workers", size, 1)
    axes = dict(zip(names, sizes, strict=True))
    _check_algorithm("simulate(algorithm)", algorithm)
    return _cluster(
        algorithm,
        axes,
        step=_each(algorithm.step, lanes, math.prod(axes.values())),
        sync=_together(algorithm.sync, axes, {name: (Lane(name),) for name in names}),
        mesh=None,
    )


def on_mesh(
    algorithm: Algorithm,
    mesh: Mesh,
    workers: int | None = None,
    *,
    axis: str | Sequence[str] = "worker",
    lanes: str = "vmap",
) -> Cluster:
    """Spreads workers over the devices of a mesh.

    Mesh axes that are not worker axes stay automatic: parameters that enter `init`
    sharded over them stay so in every worker, and a synchronisation moves only each
    device's own piece.

    Args:
      algorithm: what one worker does.
      mesh: any mesh; its axes are used as automatic ones.
      workers: K, a multiple of the number of places that the worker axes have; that
        number itself if None. Workers that share a place are its lanes.
      axis: mesh axis over which the workers spread, or several, outermost first.
        Lanes belong to the last.
      lanes: how the local steps of a place's workers run: "vmap", batched together,
        or "map", one after another, which suits convolutions on CPUs.

    Returns:
      A cluster.

    Raises:
      ValueError: if the mesh lacks an axis or K is no multiple of the places.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.1),
      ...                            rule=lsgd.average())
      >>> mesh = jax.make_mesh((jax.device_count(),), ("worker",))
      >>> cluster = lsgd.on_mesh(algorithm, mesh, workers=2 * jax.device_count())
    """
    names = _as_tuple(axis)
    if not isinstance(mesh, Mesh):
        raise TypeError(f"on_mesh(mesh): a jax.sharding.Mesh is needed, got {mesh!r}")
    for name in names:
        if name not in mesh.shape:
            raise ValueError(
                f"on_mesh(mesh, axis={axis!r}): the mesh has the axes "
                f"{mesh.axis_names}, and no {name!r}"
            )
    _check_algorithm("on_mesh(algorithm)", algorithm)
    places = math.prod(mesh.shape[name] for name in names)
    workers = places if workers is None else workers
    checks.integer("on_mesh(workers)", "the number of workers", workers, 1)
    if workers % places:
        raise ValueError(
            f"on_mesh(workers): workers must be a multiple of the {places} places on "
            f"the mesh axes {names}, got {workers}"
        )
    # Explicit axes, which make_mesh now gives by default, refuse batches that are
    # not placed yet and user code that mixes shardings.
    mesh = Mesh(
        mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim
    )
    per_place = {LANE: workers // places}
    axes = {name: mesh.shape[name] for name in names}
    axes[names[-1]] *= workers // places
    carriers = {name: (name,) for name in names} | {names[-1]: (names[-1], LANE)}
    return _cluster(
        algorithm,
        axes,
        step=_each(algorithm.step, lanes, workers // places),
        sync=_together(algorithm.sync, per_place, carriers),
        mesh=mesh,
    )


def _cluster(
    algorithm: Algorithm,
    axes: Mapping[str, int],
    *,
    step: Callable,
    sync: Callable,
    mesh: Mesh | None,
) -> Cluster:
    """Makes the verbs of K workers from those of the workers at one place."""
    count = math.prod(axes.values())
    sync_if = partial(_sync_if, sync)
    if mesh is not None:
        step, sync, sync_if = _spread_over(mesh, axes, step, sync, sync_if)

    @jax.jit
    def cluster_step(state: State, batch: PyTree) -> tuple[State, PyTree]:
        checks.leading("step(state, batch)", batch, count)
        workers, metrics = step(state.workers, batch)
        return state._replace(step=state.step + 1, workers=workers), metrics

    @jax.jit
    def communicate(state: State, weight: jax.Array | None) -> State:
        turn = state.round + 1
        workers, own, agreed = sync(
            state.workers, state.own, state.agreed, turn, weight
        )
        return State(state.step, turn, workers, own, agreed)

    @jax.jit
    def communicate_if(due: jax.Array, state: State, weight: jax.Array | None) -> State:
        turn = state.round + jnp.asarray(due, jnp.int32)
        workers, own, agreed = sync_if(
            due, state.workers, state.own, state.agreed, turn, weight
        )
        return State(state.step, turn, workers, own, agreed)

    def cluster_sync(state: State, weight: jax.Array | None = None) -> State:
        return communicate(state, checks.weight(weight, count))

    def cluster_sync_if(
        due: jax.Array | bool, state: State, weight: jax.Array | None = None
    ) -> State:
        return communicate_if(due, state, checks.weight(weight, count))

    return Cluster(
        partial(_init, algorithm, count, mesh, tuple(axes)),
        cluster_step,
        cluster_sync,
        count,
        partial(_put, count, mesh, tuple(axes)),
        partial(_sent, algorithm, axes),
        algorithm,
        cluster_sync_if,
    )


def _spread_over(
    mesh: Mesh,
    axes: Mapping[str, int],
    step: Callable,
    sync: Callable,
    sync_if: Callable,
) -> tuple[Callable, Callable, Callable]:
    """Runs the verbs of a place at each place of a mesh."""
    split, same = P(tuple(axes)), P()
    # Every value in here is a worker's own copy or reduced by the rule itself, so
    # varying-axes checks have nothing to add; with them a worker's gradient of anything
    # replicated would be summed over workers, and cond around a pmean would not
    # type-check.
    spread = partial(jax.shard_map, mesh=mesh, axis_names=set(axes), check_vma=False)
    parts = (split, split, same)
    return (
        spread(step, in_specs=(split, split), out_specs=(split, split)),
        spread(sync, in_specs=(*parts, same, split), out_specs=parts),
        # The conditional stands inside: around a shard_map, the compiler for GPUs of
        # JAX 0.11 gathers all that the branches return, due or not.
        spread(sync_if, in_specs=(same, *parts, same, split), out_specs=parts),
    )


def _sent(
    algorithm: Algorithm,
    axes: Mapping[str, int],
    state: State,
    turn: int | None = None,
) -> tuple[int, int]:
    """Counts what one worker sends in a round, as if it had a device of its own."""
    given = jax.eval_shape(lambda state: state, state)
    worker, own = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
        (given.workers, given.own),
    )
    carriers = {name: (name,) for name in axes}

    def talk(worker, own, agreed, traced_turn):
        context = Context(carriers, traced_turn if turn is None else turn)
        return algorithm.sync(worker, RuleState(agreed, own), context)

    return sent_bytes(talk, axes, worker, own, given.agreed, given.round)


def _each(step: Callable, lanes: str, count: int) -> Callable:
    """Runs one worker's step for all workers at a place: leaves (R, ...)."""
    if lanes not in ("vmap", "map"):
        raise ValueError(f'lanes: it must be "vmap" or "map", got {lanes!r}')
    if count == 1:
        return partial(_alone, step)
    if lanes == "vmap":
        return jax.vmap(step)
    return lambda workers, batch: jax.lax.map(
        lambda pair: step(*pair), (workers, batch)
    )


def _alone(step: Callable, workers: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
    """Runs the step of the only worker at a place, leaves (1, ...), as it is written.

    Products of matrices with a batch axis of one are a fifth slower on CPUs.
    """
    one = jax.tree.map(lambda x: x[0], (workers, batch))
    return jax.tree.map(lambda x: jnp.asarray(x)[None], step(*one))


def _together(
    sync: Callable, sizes: Mapping[str, int], carriers: Mapping[str, tuple[str, ...]]
) -> Callable:
    """Runs one worker's sync for all workers at a place, under the axes named."""

    def one(worker, own, agreed, turn, weight):
        worker, state = sync(
            worker, RuleState(agreed, own), Context(carriers, turn, weight)
        )
        return worker, state.own, state.agreed

    for name in reversed(list(sizes)):
        # out_axes=None proves that what is agreed does not depend on a worker.
        one = jax.vmap(
            one,
            in_axes=(0, 0, None, None, 0),
            out_axes=(0, 0, None),
            axis_name=name,
            axis_size=sizes[name],
        )
    grid = tuple(sizes.values())

    def together(workers, own, agreed, turn, weight):
        split = partial(jax.tree.map, lambda x: x.reshape(*grid, *x.shape[1:]))
        join = partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[len(grid) :]))
        parts = split(workers), split(own), agreed, turn, split(weight)
        try:
            workers, own, agreed = one(*parts)
        except ValueError as error:
            if "out_axes" not in str(error):
                raise
            raise ValueError(
                "rule: RuleState.agreed must be computed from reduced values and from "
                "itself, but depends on a worker's own"
            ) from error
        return join(workers), join(own), agreed

    return together


def _sync_if(sync: Callable, due, workers, own, agreed, turn, weight):
    """Synchronises the workers at a place, or leaves them as they are."""
    return jax.lax.cond(
        due,
        lambda parts: sync(*parts, turn, weight),
        lambda parts: parts,
        (workers, own, agreed),
    )


def _init(
    algorithm: Algorithm,
    count: int,
    mesh: Mesh | None,
    names: tuple[str, ...],
    params: PyTree,
) -> State:
    """Gives every worker a copy of its own; shapes give shapes."""
    abstract = shapes.abstract(params)
    if mesh is not None and mesh.is_multi_process and not abstract:
        facts = {"workers": count, "mesh": dict(mesh.shape)}
        facts |= {
            "rule": describe(algorithm.sync),
            "params": processes.described(params),
        }
        holders = processes.holders(NamedSharding(mesh, P()))
        agreement.same("init(params)", facts, holders)
    worker, rule_state = (
        shapes.like(jax.eval_shape(algorithm.init, params), params)
        if abstract
        else algorithm.init(params)
    )
    zero = jnp.int32(0)
    one = State(zero, zero, worker, rule_state.own, rule_state.agreed)

    def many(one: State) -> State:
        # Copies, since a buffer that stands in two places cannot be donated.
        copied = jax.tree.map(lambda x: _strong(jnp.copy(x)), one)
        spread = partial(jax.tree.map, partial(_spread, count), is_leaf=_is_rows)
        return copied._replace(workers=spread(copied.workers), own=spread(copied.own))

    if mesh is None:
        return jax.eval_shape(many, one) if abstract else jax.jit(many)(one)
    within = partial(_within, mesh, names)
    split = partial(_within, mesh, names, lead=(names,))
    rows = NamedSharding(mesh, P(names))
    shardings = jax.tree.map(within, one)._replace(
        workers=jax.tree.map(split, one.workers),
        own=jax.tree.map(
            lambda x: jax.tree.map(lambda _: rows, x) if _is_rows(x) else split(x),
            one.own,
            is_leaf=_is_rows,
        ),
    )
    if abstract:
        return shapes.placed(jax.eval_shape(many, one), shardings)
    placed = jax.tree.map(lambda x: processes.place(x, within(x)), one)
    return jax.jit(many, out_shardings=shardings)(placed)


def _is_rows(x: PyTree) -> bool:
    """Returns whether a part has its row for each worker already."""
    return isinstance(x, Rows)


def _spread(count: int, x: jax.Array | Rows) -> jax.Array | Rows:
    """Repeats a leaf for K workers; a PRNG key becomes another key for each."""
    if isinstance(x, Rows):
        checks.leading("init(params): rows of the rule's own state", x.tree, count)
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        keys = x.reshape(-1)
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
        return fold(keys, jnp.arange(count)).reshape(count, *x.shape)
    return jnp.broadcast_to(x, (count, *x.shape))


def _strong(x: jax.Array) -> jax.Array:
    """Drops the weak type of a leaf that came from a Python number."""
    return x.astype(x.dtype) if x.weak_type else x


def _within(
    mesh: Mesh, names: tuple[str, ...], x: jax.Array, lead: tuple = ()
) -> NamedSharding:
    """Returns the sharding of a leaf over the axes within a worker, after `lead`."""
    spec, sharding = (), getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding):
        inner = set(mesh.axis_names) - set(names)
        spec = (
            tuple(name for name in _as_tuple(entry) if name in inner)
            for entry in sharding.spec
        )
    return NamedSharding(mesh, P(*lead, *spec))


def _put(
    count: int,
    mesh: Mesh | None,
    names: tuple[str, ...],
    batch: PyTree,
    time: bool = False,
) -> PyTree:
    """Sends a host batch to the workers' devices; shapes give shapes."""
    spec = P(None, names) if time else P(names)
    sharding = None if mesh is None else NamedSharding(mesh, spec)
    own = len(processes.own_rows(sharding, count, int(time)))
    checks.leading("put(batch)", batch, count, int(time), own)
    if shapes.abstract(batch):
        return shapes.placed(batch, jax.tree.map(lambda x: sharding, batch))
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x: processes.place_rows(x, sharding, count, int(time)), batch
    )


def _as_tuple(value: str | int | Sequence) -> tuple:
    """Wraps a single name or size."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _check_algorithm(call: str, algorithm: Algorithm) -> None:
    """Refuses what is not an algorithm, such as a rule."""
    if not isinstance(algorithm, Algorithm):
        raise TypeError(f"{call}: local_sgd or from_train_step make it: {algorithm!r}")
