"""Asynchronous Local SGD on one host: a thread per worker, without barriers."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.asynchronous.aggregation import (
    Aggregation,
    UpdateContext,
    resolve_aggregation,
)
from localsgd_jax.asynchronous.parameter_server import (
    History,
    ParameterServer,
    WorkQueue,
)
from localsgd_jax.asynchronous.state import (
    AsyncCluster,
    AsyncState,
    compute_update,
    get_shared_field,
    init_state,
    pull,
)
from localsgd_jax.asynchronous.thread_group import run_threads
from localsgd_jax.core.metrics import metrics_by_name
from localsgd_jax.core.pytrees import stack_leaves
from localsgd_jax.core.types import Algorithm, PyTree
from localsgd_jax.core.validation import check, check_int, check_state, check_type
from localsgd_jax.schedules.per_worker import resolve_schedules


def on_threads(
    algorithm: Algorithm,
    devices: Sequence | None = None,
    aggregation: Aggregation | None = None,
    *,
    field: str = "params",
) -> AsyncCluster:
    """Runs each worker in its own thread, on its own device.

    Each worker k repeats, without waiting for other workers:

        take the next H batches from a queue that all workers share
        xₖ ← step(xₖ, ξ), H times, compiled as one program
        under a lock: z ← z + (xₖ − rₖ) / K,   xₖ ← z,   rₖ ← z

    A slow worker takes fewer batches and the other workers take more, so the total work
    of a run does not depend on the speeds. The order of the updates does, and with it
    the rounding: two runs are in general not bitwise equal.

    `run(state, batches, *, schedule, steps=None, delay_fn=None,
    max_steps_per_dispatch=64)` takes

      batches: iterable with leaves `(K, B, ...)`, as for `train`. Each of the K rows is
        a work item, which any worker may take.
      schedule: a period or a schedule, or K of them, called with the worker's own
        number of local steps in this run.
      steps: maximum number of batches; None for all.
      delay_fn: `delay_fn(worker, seconds)`, called after the local steps of a worker
        with the seconds that they took, returns the seconds that the worker then
        sleeps; for experiments with stragglers.
      max_steps_per_dispatch: maximum number of local steps in one dispatch.

    and returns the state and the history: NumPy arrays with one entry per update, in
    the order of their application. The columns are "worker"; "steps", the number of
    local steps in the update; "staleness", the number of updates applied since this
    worker's last pull; "seconds" since the start; and the mean over its local steps of
    every scalar metric, such as "loss". A device compiles in its first round of each
    length: run once before measuring.

    If a thread raises, or on Ctrl-C, the other threads end after their current dispatch
    and the error is raised by `run`.

    Args:
      algorithm: per-worker algorithm. Its synchronisation rule is not used; the
        aggregation takes its place.
      devices: one device per worker; a device may occur several times. None for all
        devices of this process. The aggregate is stored on the first.
      aggregation: how an update changes the aggregate; None for `mean_update()`.
      field: field of the train state that is shared; all other fields are not
        synchronised.

    Returns:
      A cluster whose `run` is described above.

    Raises:
      TypeError: if the aggregation is not an `Aggregation`; at `run`, if a count is not
        an int or a schedule is neither an int nor callable.
      ValueError: without devices; at `run`, if a number is out of range or a batch
        does not have K rows.
      FloatingPointError: at `run`, if the metric "loss" is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> from localsgd_jax import asynchronous
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.1))
      >>> cluster = asynchronous.on_threads(algorithm, devices=jax.devices()[:1] * 2)
      >>> batches = [jnp.array([1.0, 3.0])] * 12                   # 12 steps, K = 2
      >>> state = cluster.init(jnp.zeros(()))
      >>> state, history = cluster.run(state, batches, schedule=4)
      >>> history["steps"].sum()
      np.int64(24)

    References:
      Stich, Local SGD Converges Fast and Communicates Little, 2019, Algorithm 2.
      arXiv:1805.09767
    """
    check_type("on_threads(algorithm)", "algorithm", algorithm, Algorithm)
    check_type("on_threads(field)", "field", field, str)
    devices = jax.local_devices() if devices is None else devices
    check_type("on_threads(devices)", "devices", devices, Sequence)
    devices = list(devices)
    for device in devices:
        name = "each of the devices"
        check_type("on_threads(devices)", name, device, jax.Device)
    if not devices:
        raise ValueError("on_threads(devices): at least one is needed, got none")
    aggregation = resolve_aggregation("on_threads(aggregation)", aggregation)
    programs = _compile(algorithm, aggregation, field, len(devices))
    return AsyncCluster(
        partial(init_state, algorithm, len(devices), aggregation, field),
        partial(_run, programs, devices),
        len(devices),
    )


def throughput(history: History) -> np.ndarray:
    """Returns the local steps per second of each worker.

    Args:
      history: from a run of `on_threads`.

    Returns:
      `(K,)` floats: the local steps of a worker up to its last update, divided by the
      seconds from the start to that update; 0 for a worker without update. K is one
      more than the highest worker index in the history.

    Example:
      >>> import numpy as np
      >>> throughput({"worker": np.array([0, 1, 0]), "steps": np.array([4, 4, 4]),
      ...             "seconds": np.array([1.0, 2.0, 4.0])})
      array([2., 2.])
    """
    check_type("throughput(history)", "history", history, Mapping)
    names = ("worker", "steps", "seconds")
    missing = [name for name in names if name not in history]
    rule = f"history must have the columns {', '.join(names)}"
    check(not missing, "throughput(history)", rule, sorted(history))
    worker = history["worker"]
    steps = np.bincount(worker, history["steps"])
    last = np.zeros(len(steps))
    np.maximum.at(last, worker, history["seconds"])
    return np.divide(steps, last, out=np.zeros_like(last), where=last > 0)


class _Programs(NamedTuple):
    """Compiled functions of a worker, run on the device of their arguments."""

    local_steps: Callable
    compute_update: Callable
    apply: Callable
    pull: Callable


def _compile(
    algorithm: Algorithm, aggregation: Aggregation, field: str, workers: int
) -> _Programs:
    """Returns the jitted functions."""

    def apply(aggregate: PyTree, update: PyTree, state: PyTree, staleness: jax.Array):
        context = UpdateContext(workers, staleness)
        return aggregation.apply(aggregate, update, state, context)

    def update_of(worker: PyTree, last_read: PyTree) -> PyTree:
        return compute_update(get_shared_field(worker, field), last_read)

    return _Programs(
        jax.jit(lambda worker, batches: jax.lax.scan(algorithm.step, worker, batches)),
        jax.jit(update_of),
        jax.jit(apply),
        jax.jit(lambda worker, z, last_read: pull(worker, field, z, last_read)),
    )


def _run(
    programs: _Programs,
    devices: list,
    state: AsyncState,
    batches: Iterable[PyTree],
    *,
    schedule: int | Callable | Sequence,
    steps: int | None = None,
    delay_fn: Callable | None = None,
    max_steps_per_dispatch: int = 64,
) -> tuple[AsyncState, History]:
    """Starts a thread per worker and joins all of them."""
    check_state("run(state)", state, AsyncState)
    check_type("run(batches)", "batches", batches, Iterable)
    if delay_fn is not None:
        check_type("run(delay_fn)", "delay_fn", delay_fn, Callable)
    due = resolve_schedules("run(schedule)", schedule, len(devices))
    if steps is not None:
        steps = check_int("run(steps)", "steps", steps, 1)
    name = "max_steps_per_dispatch"
    max_steps = check_int(f"run({name})", name, max_steps_per_dispatch, 1)
    queue = WorkQueue(itertools.islice(batches, steps), len(devices))
    server = ParameterServer(programs.apply, state, devices[0])
    enable_x64 = jnp.result_type(float) == np.float64

    def run(k: int) -> tuple[PyTree, PyTree]:
        # jax.enable_x64 is thread-local, so the caller's setting is repeated here.
        with jax.enable_x64(enable_x64):
            rows = jax.tree.map(lambda x: x[k], (state.workers, state.last_read))
            loop = _WorkerLoop(
                k, devices[k], programs, queue, server, due[k], max_steps, delay_fn
            )
            return loop.run(*jax.device_put(rows, devices[k]))

    rows = run_threads(run, queue.workers, queue.lock, queue.stop)
    workers, last_read = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *jax.device_put(rows, devices[0])
    )
    state = AsyncState(server.aggregate, server.aggregation_state, workers, last_read)
    return state, server.history()


class _WorkerLoop(NamedTuple):
    """Loop of one worker thread."""

    worker: int
    device: Any
    programs: _Programs
    queue: WorkQueue
    server: ParameterServer
    due: Callable
    max_steps: int
    delay_fn: Callable | None

    def run(self, worker: PyTree, last_read: PyTree) -> tuple[PyTree, PyTree]:
        """Alternates local steps and aggregate updates until the queue is empty.

        Args:
          worker: train state of the worker.
          last_read: parameters that it last pulled.

        Returns:
          Both after the last update.
        """
        local_step, version = 0, 0
        while True:
            start = time.perf_counter()
            worker, metrics = self._local_steps(worker, local_step)
            if not (steps := sum(count for count, _ in metrics)):
                return worker, last_read
            local_step += steps
            if self.delay_fn:
                elapsed = time.perf_counter() - start
                self.queue.stop.wait(self.delay_fn(self.worker, elapsed))
            update = self.programs.compute_update(worker, last_read)
            row = {"worker": self.worker, "steps": steps} | _means(metrics)
            aggregate, version = self.server.push_pull(update, version, row)
            aggregate = jax.device_put(aggregate, self.device)
            worker, last_read = self.programs.pull(worker, aggregate, last_read)

    def _local_steps(self, worker: PyTree, local_step: int) -> tuple[PyTree, list]:
        """Takes local steps up to the next update or the queue end."""
        metrics = []
        while True:
            entries = self.queue.get(self._steps_until_due(local_step))
            if not entries:
                return worker, metrics
            batches = jax.device_put(stack_leaves(*entries), self.device)
            worker, stacked = self.programs.local_steps(worker, batches)
            # Without blocking, the thread would time dispatch instead of execution.
            jax.block_until_ready(worker)
            local_step += len(entries)
            named = _collect_metrics(self.worker, local_step, stacked)
            metrics.append((len(entries), named))
            if self.due(local_step):
                return worker, metrics

    def _steps_until_due(self, local_step: int) -> int:
        """Returns the steps until the schedule is due, at most `max_steps`."""
        offsets = range(1, self.max_steps + 1)
        return next((i for i in offsets if self.due(local_step + i)), self.max_steps)


def _collect_metrics(
    worker: int, local_step: int, metrics: PyTree
) -> dict[str, np.ndarray]:
    """Returns the scalar metrics by name, each `(H,)`.

    Raises:
      FloatingPointError: if the metric "loss" is not finite.
    """
    named = {
        name: np.asarray(leaf) for name, leaf in metrics_by_name(metrics, 1).items()
    }
    if not np.isfinite(named.get("loss", 0.0)).all():
        raise FloatingPointError(
            f"run(): the loss of worker {worker} is not finite within its first "
            f"{local_step} local steps"
        )
    return named


def _means(metrics: list[tuple[int, dict]]) -> dict[str, float]:
    """Averages each metric over the local steps of an update."""
    names = metrics[0][1]
    return {
        name: float(np.concatenate([m[name] for _, m in metrics]).mean())
        for name in names
    }
