"""Rounds that a process computes alone, and the one program that processes share."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache, partial
from threading import Thread
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from localsgd_jax.base import Algorithm, Cluster, PyTree, State
from localsgd_jax.consensus import consensus
from localsgd_jax.meshes import among
from localsgd_jax.placement import on_mesh, simulate
from localsgd_jax.trees import narrow, widen


class Apart(NamedTuple):
    """K workers, of which each process holds its own and computes on them alone.

    Attributes:
      here: the workers of this process, as a cluster that nobody else takes part in.
      workers: K, those of all processes.
      init: `init(params) -> state` of the workers here, each as
        `on_mesh(...).init(params)` starts it. No other process takes part.
      round: `round(state, batches) -> (state, metrics)`; local steps of the workers
        here, leaves `(H, K here, B, ...)` in, `(H, K here, ...)` out. Never
        communicates; does not donate.
      agree: `agree(state, note, devices=None, weigh=False) -> (state, notes)`; a
        synchronisation of all processes of those devices, or of all, each of which
        calls it. A process's note, `(M,)` numbers, travels along: `notes`, `(N, M)`,
        has a row for each process. With `weigh` the first number of a note is the
        weight of each of its workers. All make their calls in the same order, with
        notes of one length and the same `weigh`. Waits until it is done, without a
        time limit of its own.
      mean: `mean(tree, devices=None) -> tree`; x̄ = (1/K) Σₖ xₖ of leaves `(K here,
        ...)`, in the manner of `consensus` and with the processes of those devices.
      one: a cluster of one worker in this process, for the mean of all.
      spread: `spread(state, like=None) -> state`; starts the workers here from a state
        of `one`; sharded ones need a state from `init` to be laid out like it.
      sent: as in `Cluster`, by one of all workers.
      first: number of the first worker here.
      owners: of each worker, in their order, the process that holds it.
      devices: of all processes, in the order of the mesh.
    """

    here: Cluster
    workers: int
    init: Callable[[PyTree], State]
    round: Callable[[State, PyTree], tuple[State, PyTree]]
    agree: Callable[..., tuple[State, np.ndarray]]
    mean: Callable[..., PyTree]
    one: Cluster
    spread: Callable[..., State]
    sent: Callable[..., tuple[int, int]]
    first: int
    owners: tuple[int, ...]
    devices: tuple


def apart(
    algorithm: Algorithm,
    mesh: Any,
    workers: int | None = None,
    *,
    axis: str | Sequence[str] = "worker",
    lanes: str = "vmap",
) -> Apart:
    """Lets every process compute its workers' local rounds in programs of its own.

    `on_mesh` runs one program on all processes, local steps included, so that they stay
    together. Here only the synchronisation is such a program: a process may then

    - compute while a synchronisation travels (`in_background`, `catch_up`), also on
      CPUs, where nothing runs beside a collective within one program;
    - take fewer local steps than others;
    - go on with the others that live when one has died (`resilient.train`).

    The state is that of the workers here. It becomes part of the whole, and the whole
    becomes the state again, without a copy.

    Args:
      algorithm: what one worker does.
      mesh: over the devices of all processes; each process holds whole places along
        the outermost worker axis, side by side, as `worker_mesh` lays them out.
      workers: K, a multiple of the places; None for one at each.
      axis: as in `on_mesh`.
      lanes: as in `on_mesh`.

    Returns:
      The verbs, for this process.

    Raises:
      ValueError: if a process holds no place as a whole, or not side by side, or K is
        no multiple of the places.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5),
      ...                            rule=lsgd.average())
      >>> mesh = jax.make_mesh((1,), ("worker",), devices=jax.devices()[:1])
      >>> mine = apart(algorithm, mesh, workers=2)
      >>> batches = np.array([[1.0, 3.0]], np.float32)             # H = 1, K here = 2
      >>> state, metrics = mine.round(mine.init(jnp.zeros(())), batches)
      >>> state, notes = mine.agree(state, note=[1.0])
      >>> state.workers.params
      Array([2., 2.], dtype=float32)
    """
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    place = partial(on_mesh, algorithm, axis=axis, lanes=lanes)
    whole = place(mesh, workers)
    per_place = whole.workers // place(mesh).workers

    @cache
    def part(devices: tuple) -> _Part:
        living = among(mesh, devices, axis)
        cluster = place(living, per_place * place(living).workers)
        return _Part(living, cluster, axes)

    everyone = tuple(mesh.devices.flat)
    owners = np.repeat(_owners(part(everyone)), per_place).tolist()
    here = part(tuple(d for d in everyone if d in jax.local_devices()))
    programs = _Programs(part, here, everyone)
    first = owners.index(jax.process_index())
    return Apart(
        here.cluster,
        whole.workers,
        partial(_init, algorithm, here.cluster, whole.workers, first),
        programs.round,
        programs.agree,
        programs.mean,
        simulate(algorithm, 1, axis=axes[-1]),
        partial(_spread, here, first),
        whole.sent,
        first,
        tuple(owners),
        everyone,
    )


def in_background(call: Callable, *args: Any) -> Future:
    """Runs a call in a thread that neither Ctrl-C nor the end of the process waits for.

    A program that waits for other processes may wait for ever if one has died:
    `.result(timeout)` gives up on it.

    Args:
      call: what to run.
      *args: its arguments.

    Returns:
      The future result.

    Example:
      >>> in_background(sum, [1, 2]).result(timeout=10)
      3
    """
    future, wide = Future(), jnp.result_type(float) == np.float64

    def run() -> None:
        try:
            # What jax.enable_x64 sets holds for one thread only.
            with jax.enable_x64(wide):
                future.set_result(call(*args))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


@jax.jit
def catch_up(agreed: State, now: State, captured: State) -> State:
    """Adds to what was agreed on what has been done since it was captured.

        xₖ ← agreedₖ + (xₖ − capturedₖ)

    So `overlap(rule)` defines it. What the agreement has not changed, such as another
    field or an integer, is as it is now.

    Args:
      agreed: what a synchronisation made of `captured`.
      now: what local steps have made of `captured` in the meantime.
      captured: the state that was sent.

    Returns:
      The state to go on with.

    Example:
      >>> import jax.numpy as jnp
      >>> def state(x):
      ...     return State(jnp.int32(0), jnp.int32(0), jnp.array([x]), (), ())
      >>> catch_up(state(2.0), state(4.5), state(3.0)).workers
      Array([3.5], dtype=float32)
    """

    def add(a: jax.Array, x: jax.Array, s: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        moved = a
        if jnp.issubdtype(x.dtype, jnp.inexact):
            moved = narrow(widen(a) + (widen(x) - widen(s)), x)
        return jnp.where(a == s, x, moved)

    workers = jax.tree.map(add, agreed.workers, now.workers, captured.workers)
    return agreed._replace(step=now.step, workers=workers)


class _Part(NamedTuple):
    """Some places of the mesh, the workers there, and the axes along which they are."""

    mesh: Any
    cluster: Cluster
    axes: tuple[str, ...]


class _Programs:
    """The compiled programs, others for each set of processes that take part."""

    def __init__(self, part: Callable, here: _Part, everyone: tuple) -> None:
        """Compiles nothing yet."""
        self.part, self.here, self.everyone = part, here, everyone
        self.compiled = {}

    def round(self, state: State, batches: PyTree) -> tuple[State, PyTree]:
        """Takes the local steps of the workers here."""

        def steps(state: State, batches: PyTree) -> tuple[State, PyTree]:
            return jax.lax.scan(self.here.cluster.step, state, batches)

        return self.compile("round", steps, (_shardings(state), None))(state, batches)

    def agree(
        self,
        state: State,
        note: Sequence[float] | np.ndarray = (),
        devices: Sequence | None = None,
        weigh: bool = False,
    ) -> tuple[State, np.ndarray]:
        """Synchronises with the processes of those devices."""
        if weigh:
            _check_weight(note)
        there = self.part(self.living("agree", devices))

        def meet(state: State, notes: jax.Array) -> tuple[State, jax.Array]:
            each = there.cluster.workers // len(notes)
            weight = jnp.repeat(notes[:, 0], each) if weigh else None
            return there.cluster.sync(state, weight), notes

        whole = _moved(there, state)
        kept = _shardings(whole), NamedSharding(there.mesh, P())
        meet = self.compile(f"agree {weigh}", meet, kept)
        whole, notes = jax.block_until_ready(meet(whole, _noted(there, note)))
        first = [_places(there).index(process) for process in set(_places(there))]
        return _moved(self.here, whole), notes.addressable_data(0)[np.sort(first)]

    def mean(self, tree: PyTree, devices: Sequence | None = None) -> PyTree:
        """Averages over the workers of those devices."""
        there = self.part(self.living("mean", devices))

        def mean(tree: PyTree) -> PyTree:
            zero = jnp.int32(0)
            return consensus(State(zero, zero, tree, (), ()), None)

        whole = _rows(there, tree)
        kept = jax.tree.map(
            lambda x: NamedSharding(there.mesh, P(*x.sharding.spec[1:])), whole
        )
        averaged = jax.block_until_ready(self.compile("mean", mean, kept)(whole))
        return jax.tree.map(partial(_pieces, self.here.mesh), averaged)

    def living(self, call: str, devices: Sequence | None) -> tuple:
        """Returns the devices that take part, all if None; refuses to be left out."""
        there = self.everyone if devices is None else tuple(devices)
        if not set(self.here.mesh.devices.flat) <= set(there):
            raise ValueError(
                f"{call}(devices): those of this process must be among them, got "
                f"devices of the processes {sorted({d.process_index for d in there})}"
            )
        return there

    def compile(self, name: str, program: Callable, out: PyTree) -> Callable:
        """Returns the program of that name with those shardings, compiled once.

        What is put together from pieces must stay where it is: the compiler may not
        choose.
        """
        leaves, structure = jax.tree.flatten(out)
        key = (name, structure, *leaves)
        if key not in self.compiled:
            self.compiled[key] = jax.jit(program, out_shardings=out)
        return self.compiled[key]


def _pieces(mesh: Any, x: Any) -> jax.Array:
    """Makes the pieces that this process holds a leaf on that mesh, without a copy."""
    return _assembled(x.shape, NamedSharding(mesh, x.sharding.spec), x)


def _rows(part: _Part, tree: PyTree) -> PyTree:
    """Makes the rows that this process holds rows of all workers of a part."""

    def row(x: Any) -> jax.Array:
        # On a mesh of one device programs forget the axis of the rows.
        spec = P(part.axes, *x.sharding.spec[1:])
        shape = (part.cluster.workers, *x.shape[1:])
        return _assembled(shape, NamedSharding(part.mesh, spec), x)

    return jax.tree.map(row, tree)


def _assembled(shape: tuple, sharding: NamedSharding, x: jax.Array) -> jax.Array:
    """Makes an array of the pieces of another."""
    pieces = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _moved(part: _Part, state: State) -> State:
    """Makes the state of the workers here that of a part, or the other way round."""
    same = jax.tree.map(partial(_pieces, part.mesh), state._replace(workers=(), own=()))
    return same._replace(workers=_rows(part, state.workers), own=_rows(part, state.own))


def _noted(part: _Part, note: Sequence[float] | np.ndarray) -> jax.Array:
    """Puts the notes of all places of a part below each other."""
    row = np.asarray(note, np.float32)[None]
    sharding = NamedSharding(part.mesh, P(part.axes[0]))
    here = sharding.addressable_devices
    return jax.make_array_from_single_device_arrays(
        (part.mesh.shape[part.axes[0]], row.size),
        sharding,
        [jax.device_put(row, device) for device in here],
    )


def _check_weight(note: Sequence[float] | np.ndarray) -> None:
    """Refuses a note whose first number is no weight."""
    first = np.asarray(note, np.float32)[:1]
    if not (first.size and np.isfinite(first) and first >= 0):
        raise ValueError(
            "agree(weigh): the first number of the note must be a weight, finite and "
            f"not negative, got {list(note)}"
        )


def _shardings(tree: PyTree) -> PyTree:
    """Returns where the leaves are."""
    return jax.tree.map(lambda x: x.sharding, tree)


def _places(part: _Part) -> list[int]:
    """Returns which process holds each place, and refuses a place that two share."""
    along = part.mesh.axis_names.index(part.axes[0])
    grid = np.vectorize(lambda device: device.process_index)(part.mesh.devices)
    places = np.moveaxis(grid, along, 0).reshape(grid.shape[along], -1)
    if (places != places[:, :1]).any():
        raise ValueError(
            "apart(mesh): a process must hold whole places along the axis "
            f"{part.axes[0]!r}, got the processes {places.tolist()}"
        )
    return places[:, 0].tolist()


def _owners(part: _Part) -> list[int]:
    """Returns which process holds each place; refuses one with others in between."""
    places = _places(part)
    if len(list(itertools.groupby(places))) > len(set(places)):
        raise ValueError(
            "apart(mesh): the places of a process must be side by side along the axis "
            f"{part.axes[0]!r}, got the processes {places}"
        )
    return places


def _init(
    algorithm: Algorithm, here: Cluster, workers: int, first: int, params: PyTree
) -> State:
    """Starts the workers here as those of the whole are started."""
    params = jax.tree.map(jnp.asarray, params)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )

    def start(params: PyTree) -> State:
        everyone = simulate(algorithm, workers).init(params)
        rows = partial(jax.tree.map, lambda x: x[first : first + here.workers])
        return everyone._replace(workers=rows(everyone.workers), own=rows(everyone.own))

    return jax.jit(start, out_shardings=_shardings(here.init(shapes)))(params)


def _spread(here: _Part, first: int, one: State, like: State | None = None) -> State:
    """Starts the workers here from one; each but the first of all gets keys of its own.

    xₖ ← x
    """
    numbers = first + jnp.arange(here.cluster.workers)

    def spread(x: jax.Array) -> jax.Array:
        row = x[0]
        if jnp.issubdtype(row.dtype, jax.dtypes.prng_key):
            fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
            keys = fold(row.reshape(-1), numbers).reshape(len(numbers), *row.shape)
            first_of_all = (numbers == 0).reshape(-1, *(1,) * row.ndim)
            return jnp.where(first_of_all, row[None], keys)
        return jnp.broadcast_to(row, (len(numbers), *row.shape))

    def start(one: State) -> State:
        rows = partial(jax.tree.map, spread)
        return one._replace(workers=rows(one.workers), own=rows(one.own))

    split = NamedSharding(here.mesh, P(here.axes))
    same = NamedSharding(here.mesh, P())
    out = jax.tree.map(lambda x: same, one)._replace(
        workers=jax.tree.map(lambda x: split, one.workers),
        own=jax.tree.map(lambda x: split, one.own),
    )
    out = out if like is None else _shardings(like)
    return jax.jit(start, out_shardings=out)(jax.device_put(one, same))
