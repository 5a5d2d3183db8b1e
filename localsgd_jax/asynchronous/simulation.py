"""Asynchronous Local SGD on a virtual clock, as one compiled program."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.asynchronous.aggregation import (
    Aggregation,
    Arrival,
    check_aggregation,
)
from localsgd_jax.asynchronous.events import STEP, Events
from localsgd_jax.asynchronous.state import (
    Asynchronous,
    AsyncState,
    adopt,
    get,
    progress,
    start,
)
from localsgd_jax.base import Algorithm, PyTree


def simulate(
    algorithm: Algorithm,
    events: Events,
    aggregation: Aggregation | None = None,
    *,
    field: str = "params",
) -> Asynchronous:
    """Plays events, one after another, in one `jax.lax.scan`.

    With the aggregate z, and what worker k last read, rₖ:

        step    xₖ ← step(xₖ, ξ)
        send    pₖ = xₖ − rₖ
        arrive  z ← z + pₖ / K          or what the aggregation makes of pₖ
        read    xₖ ← z,   rₖ ← z

    A write is late by its delay, a read is not: a worker may go on without its own
    last progress, which is under way and reaches z later. Progress counts from what
    was read, so it is neither lost nor added twice; at the end all has arrived:

        z = x₀ + (1/K) Σ p

    Equal events give equal bits.

    Args:
      algorithm: what one worker does. Its rule is for workers that meet; here the
        aggregation takes its place.
      events: from `order`.
      aggregation: how a write changes the aggregate; None for `add()`.
      field: the field of the train state that is shared; all others stay the
        worker's own.

    Returns:
      A place whose `run(state, batches)` takes leaves `(T, K, B, ...)`, the batch of
      each worker's own local step, and returns the state and the metrics of each
      local step, in the order of the events of kind 0.

    Raises:
      TypeError: if an argument is not what it must be.
      ValueError: at `init`, if the state lacks the field; at `run`, if the batches
        are not `(T, K, ...)`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> from localsgd_jax import asynchronous
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5),
      ...                            rule=lsgd.average())
      >>> events = asynchronous.order(workers=2, steps=1, every=1, speed=[2, 1])
      >>> place = asynchronous.simulate(algorithm, events)
      >>> batches = jnp.array([[1.0, 3.0]])                        # (T, K)
      >>> state, metrics = place.run(place.init(jnp.zeros(())), batches)
      >>> state.aggregate, state.workers.params
      (Array(2., dtype=float32), Array([0.5, 2. ], dtype=float32))

    References:
      Stich, Local SGD Converges Fast and Communicates Little, 2019, Algorithm 2.
      arXiv:1805.09767
    """
    if not isinstance(events, Events):
        raise TypeError(f"simulate(events): they come from order(), got {events!r}")
    aggregation = check_aggregation("simulate(aggregation)", aggregation)
    workers, steps = int(events.worker.max()) + 1, int(events.step.max())
    slots = int(events.slot.max()) + 1
    stepped = np.flatnonzero(events.kind == STEP)

    @jax.jit
    def run(state: AsyncState, batches: PyTree) -> tuple[AsyncState, PyTree]:
        _check_batches(batches, steps, workers)
        flight = jax.tree.map(
            lambda z: jnp.zeros((slots, *z.shape), z.dtype), state.aggregate
        )
        actions = [
            partial(_step, algorithm, batches),
            partial(_send, field),
            partial(_arrive, aggregation, workers),
            partial(_read, field),
        ]
        columns = _Event(*(jnp.asarray(getattr(events, x)) for x in _Event._fields))
        (state, _), metrics = jax.lax.scan(
            _chooser(actions), _Sky(state, flight), columns
        )
        return state, jax.tree.map(lambda x: x[stepped], metrics)

    return Asynchronous(
        partial(start, algorithm, workers, aggregation, field), run, workers
    )


class _Event(NamedTuple):
    """What the program needs of an event."""

    kind: jax.Array
    worker: jax.Array
    step: jax.Array
    slot: jax.Array
    missed: jax.Array


class _Sky(NamedTuple):
    """The state, and the progress that is under way: leaves (slots, ...)."""

    state: AsyncState
    flight: PyTree


def _chooser(actions: list) -> Callable:
    """Makes the body of the scan: the action of an event; all but a step are mute."""
    step, *others = actions

    def play(sky: _Sky, event: _Event) -> tuple[_Sky, PyTree]:
        shapes = jax.eval_shape(step, sky, event)[1]
        blank = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), shapes)
        mute = [lambda sky, event, act=act: (act(sky, event), blank) for act in others]
        return jax.lax.switch(event.kind, [step, *mute], sky, event)

    return play


def _step(
    algorithm: Algorithm, batches: PyTree, sky: _Sky, event: _Event
) -> tuple[_Sky, PyTree]:
    """Takes a local step."""
    state = sky.state
    batch = jax.tree.map(lambda x: x[event.step - 1, event.worker], batches)
    worker, metrics = algorithm.step(_row(state.workers, event.worker), batch)
    workers = _with_row(state.workers, event.worker, worker)
    return sky._replace(state=state._replace(workers=workers)), metrics


def _send(field: str, sky: _Sky, event: _Event) -> _Sky:
    """Puts a worker's progress under way."""
    params, read = _row((get(sky.state.workers, field), sky.state.read), event.worker)
    flight = _with_row(sky.flight, event.slot, progress(params, read))
    return sky._replace(flight=flight)


def _arrive(aggregation: Aggregation, workers: int, sky: _Sky, event: _Event) -> _Sky:
    """Lets the progress in a slot change the aggregate."""
    aggregate, memory = aggregation.apply(
        sky.state.aggregate,
        _row(sky.flight, event.slot),
        sky.state.memory,
        Arrival(workers, event.missed),
    )
    return sky._replace(state=sky.state._replace(aggregate=aggregate, memory=memory))


def _read(field: str, sky: _Sky, event: _Event) -> _Sky:
    """Lets a worker read the aggregate."""
    state, k = sky.state, event.worker
    worker, read = adopt(
        _row(state.workers, k), field, state.aggregate, _row(state.read, k)
    )
    state = state._replace(
        workers=_with_row(state.workers, k, worker), read=_with_row(state.read, k, read)
    )
    return sky._replace(state=state)


def _row(tree: PyTree, index: jax.Array) -> PyTree:
    """Returns one row of each leaf."""
    return jax.tree.map(lambda x: x[index], tree)


def _with_row(tree: PyTree, index: jax.Array, row: PyTree) -> PyTree:
    """Replaces one row of each leaf."""
    return jax.tree.map(lambda x, r: x.at[index].set(r), tree, row)


def _check_batches(batches: PyTree, steps: int, workers: int) -> None:
    """Refuses batches that are not one for each step and worker."""
    for path, leaf in jax.tree.leaves_with_path(batches):
        if (shape := jnp.shape(leaf))[:2] != (steps, workers):
            raise ValueError(
                "run(state, batches): the leading axes of every leaf must be the "
                f"{steps} steps and {workers} workers of the events, got shape "
                f"{shape} at {jax.tree_util.keystr(path) or 'the root'}"
            )
