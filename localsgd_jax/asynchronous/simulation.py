"""Asynchronous Local SGD on a virtual clock, as one compiled program."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.asynchronous.aggregation import (
    Aggregation,
    UpdateContext,
    resolve_aggregation,
)
from localsgd_jax.asynchronous.events import EventKind, EventTrace
from localsgd_jax.asynchronous.state import (
    AsyncCluster,
    AsyncState,
    compute_update,
    get_shared_field,
    init_state,
    pull,
)
from localsgd_jax.core.types import Algorithm, PyTree
from localsgd_jax.core.validation import check_array_leaves, check_state, check_type


def simulate(
    algorithm: Algorithm,
    events: EventTrace,
    aggregation: Aggregation | None = None,
    *,
    field: str = "params",
) -> AsyncCluster:
    """Simulates asynchronous workers by one `jax.lax.scan` over an event trace.

    With the aggregate z, and the value rₖ that worker k last pulled:

        STEP    xₖ ← step(xₖ, ξ)
        PUSH    pₖ = xₖ − rₖ
        APPLY   z ← z + pₖ / K          or as the aggregation defines
        PULL    xₖ ← z,   rₖ ← z

    Updates are delayed, pulls are not: a worker may continue from an aggregate that
    does not contain its own last update, which is still in flight. Updates are
    differences to the last pulled value, so each one is applied exactly once. At the
    end of a run no update is in flight:

        z = x₀ + (1/K) Σ p

    Equal events give bitwise equal results.

    Args:
      algorithm: per-worker algorithm. Its synchronisation rule is not used; the
        aggregation takes its place.
      events: from `simulate_events`.
      aggregation: how an update changes the aggregate; None for `mean_update()`.
      field: field of the train state that is shared; all other fields are not
        synchronised.

    Returns:
      A cluster whose `run(state, batches)` takes leaves `(T, K, B, ...)`, the batch of
      each local step of each worker. It returns the state and the metrics of each
      local step, in the order of the STEP events.

    Raises:
      TypeError: if the events are not an `EventTrace` or the aggregation is not an
        `Aggregation`; at `init`, if a leaf of the field is not floating point.
      ValueError: at `init`, if the state lacks the field; at `run`, if the batches
        are not `(T, K, ...)`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> from localsgd_jax import asynchronous
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5))
      >>> events = asynchronous.simulate_events(2, steps=1, schedule=1, speed=[2, 1])
      >>> cluster = asynchronous.simulate(algorithm, events)
      >>> batches = jnp.array([[1.0, 3.0]])                        # (T, K)
      >>> state, metrics = cluster.run(cluster.init(jnp.zeros(())), batches)
      >>> state.aggregate, state.workers.params
      (Array(2., dtype=float32), Array([0.5, 2. ], dtype=float32))

    References:
      Stich, Local SGD Converges Fast and Communicates Little, 2019, Algorithm 2.
      arXiv:1805.09767
    """
    check_type("simulate(algorithm)", "algorithm", algorithm, Algorithm)
    check_type("simulate(events)", "events", events, EventTrace)
    check_type("simulate(field)", "field", field, str)
    aggregation = resolve_aggregation("simulate(aggregation)", aggregation)
    workers, steps = int(events.worker.max()) + 1, int(events.step.max())
    slots = int(events.buffer_slot.max()) + 1
    step_events = np.flatnonzero(events.kind == EventKind.STEP)

    @jax.jit
    def run(state: AsyncState, batches: PyTree) -> tuple[AsyncState, PyTree]:
        _check_batches(batches, steps, workers)
        in_flight = jax.tree.map(
            lambda z: jnp.zeros((slots, *z.shape), z.dtype), state.aggregate
        )
        body = _event_switch(
            partial(_on_step, algorithm, batches),
            partial(_on_push, field),
            partial(_on_apply, aggregation, workers),
            partial(_on_pull, field),
        )
        columns = _Event(*(jnp.asarray(getattr(events, x)) for x in _Event._fields))
        carry, metrics = jax.lax.scan(body, _SimulatorCarry(state, in_flight), columns)
        return carry.state, jax.tree.map(lambda x: x[step_events], metrics)

    def checked_run(state: AsyncState, batches: PyTree) -> tuple[AsyncState, PyTree]:
        check_state("run(state)", state, AsyncState)
        check_array_leaves("run(batches)", "batches", batches)
        return run(state, batches)

    init = partial(init_state, algorithm, workers, aggregation, field)
    return AsyncCluster(init, checked_run, workers)


class _Event(NamedTuple):
    """Columns of an `EventTrace` used by the compiled program."""

    kind: jax.Array
    worker: jax.Array
    step: jax.Array
    buffer_slot: jax.Array
    staleness_updates: jax.Array


class _SimulatorCarry(NamedTuple):
    """Carry of the scan: the state and in-flight updates, leaves `(slots, ...)`."""

    state: AsyncState
    in_flight: PyTree


def _event_switch(
    on_step: Callable, on_push: Callable, on_apply: Callable, on_pull: Callable
) -> Callable:
    """Returns the scan body, a switch over the event kind.

    The branches are in the order of `EventKind`. Only STEP events have metrics; the
    other branches return zeros.
    """

    def body(carry: _SimulatorCarry, event: _Event) -> tuple[_SimulatorCarry, PyTree]:
        shapes = jax.eval_shape(on_step, carry, event)[1]
        zero_metrics = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), shapes)
        without_metrics = [
            lambda carry, event, handler=handler: (handler(carry, event), zero_metrics)
            for handler in (on_push, on_apply, on_pull)
        ]
        return jax.lax.switch(event.kind, [on_step, *without_metrics], carry, event)

    return body


def _on_step(
    algorithm: Algorithm, batches: PyTree, carry: _SimulatorCarry, event: _Event
) -> tuple[_SimulatorCarry, PyTree]:
    """Takes a local step of the worker."""
    state = carry.state
    batch = jax.tree.map(lambda x: x[event.step - 1, event.worker], batches)
    worker, metrics = algorithm.step(_take_row(state.workers, event.worker), batch)
    workers = _with_row(state.workers, event.worker, worker)
    return carry._replace(state=state._replace(workers=workers)), metrics


def _on_push(field: str, carry: _SimulatorCarry, event: _Event) -> _SimulatorCarry:
    """Stores the update of the worker in an in-flight buffer."""
    params = get_shared_field(carry.state.workers, field)
    params, last_read = _take_row((params, carry.state.last_read), event.worker)
    update = compute_update(params, last_read)
    return carry._replace(
        in_flight=_with_row(carry.in_flight, event.buffer_slot, update)
    )


def _on_apply(
    aggregation: Aggregation, workers: int, carry: _SimulatorCarry, event: _Event
) -> _SimulatorCarry:
    """Applies the update of an in-flight buffer to the aggregate."""
    aggregate, aggregation_state = aggregation.apply(
        carry.state.aggregate,
        _take_row(carry.in_flight, event.buffer_slot),
        carry.state.aggregation_state,
        UpdateContext(workers, event.staleness_updates),
    )
    state = carry.state._replace(
        aggregate=aggregate, aggregation_state=aggregation_state
    )
    return carry._replace(state=state)


def _on_pull(field: str, carry: _SimulatorCarry, event: _Event) -> _SimulatorCarry:
    """Replaces the parameters of the worker by the aggregate."""
    state, k = carry.state, event.worker
    worker, last_read = pull(
        _take_row(state.workers, k),
        field,
        state.aggregate,
        _take_row(state.last_read, k),
    )
    state = state._replace(
        workers=_with_row(state.workers, k, worker),
        last_read=_with_row(state.last_read, k, last_read),
    )
    return carry._replace(state=state)


def _take_row(tree: PyTree, index: jax.Array) -> PyTree:
    """Returns one row of each leaf."""
    return jax.tree.map(lambda x: x[index], tree)


def _with_row(tree: PyTree, index: jax.Array, row: PyTree) -> PyTree:
    """Replaces one row of each leaf."""
    return jax.tree.map(lambda x, r: x.at[index].set(r), tree, row)


def _check_batches(batches: PyTree, steps: int, workers: int) -> None:
    """Raises unless all leaves start with `(T, K)`."""
    for path, leaf in jax.tree.leaves_with_path(batches):
        if (shape := jnp.shape(leaf))[:2] != (steps, workers):
            raise ValueError(
                "run(state, batches): the leading axes of every leaf must be the "
                f"{steps} steps and {workers} workers of the events, got shape "
                f"{shape} at {jax.tree_util.keystr(path) or 'the root'}"
            )
