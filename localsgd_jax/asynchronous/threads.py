"""Asynchronous Local SGD on one host: a thread for each device, and no barrier."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.asynchronous.aggregation import (
    Aggregation,
    Arrival,
    check_aggregation,
)
from localsgd_jax.asynchronous.checks import as_schedules, whole
from localsgd_jax.asynchronous.desk import Desk, History, Work, stack
from localsgd_jax.asynchronous.state import (
    Asynchronous,
    AsyncState,
    adopt,
    get,
    progress,
    start,
)
from localsgd_jax.asynchronous.together import together
from localsgd_jax.base import Algorithm, PyTree


def on_threads(
    algorithm: Algorithm,
    devices: Sequence | None = None,
    aggregation: Aggregation | None = None,
    *,
    field: str = "params",
) -> Asynchronous:
    """Runs a worker on each device, in a thread of its own.

    Each worker k, over and over and without waiting for anyone:

        take the next H batches that nobody has taken
        xₖ ← step(xₖ, ξ), H times, compiled as one program
        under a lock: z ← z + (xₖ − rₖ) / K,   xₖ ← z,   rₖ ← z

    A slow worker takes fewer batches and the others more, so the work of a run does
    not depend on the speeds. The order of the exchanges does, and with it the last
    digits: no two runs need be equal.

    `run(state, batches, *, every, steps=None, pause=None, chunk=64)` takes

      batches: as `train` does: an iterable with leaves `(K, B, ...)`. Its K parts are
        work for whoever is free next, whichever worker that is.
      every: a period or a schedule, or K of them, called with the worker's own
        number of local steps in this run.
      steps: batches to take at most; None for all.
      pause: `pause(worker, seconds)`, called after each worker's local steps with the
        time that they took, gives the seconds that the worker then sleeps; for
        experiments with slow workers.
      chunk: most local steps in one dispatch.

    and returns the state and the history: NumPy columns with an entry for each
    exchange, in their order. "worker"; "steps", the local steps in it; "missed", the
    writes of others since this worker had read; "seconds" since the start; and the
    mean over its steps of every metric that is a number, such as "loss". A device
    compiles in its first round of each length: run once before measuring.

    If a thread fails, or Ctrl-C is pressed, the others end after the dispatch that
    they are in, and the error is raised here.

    Args:
      algorithm: what one worker does. Its rule is for workers that meet; here the
        aggregation takes its place.
      devices: one for each worker, a device may serve several; None for all of this
        process. The aggregate lives on the first.
      aggregation: how a write changes the aggregate; None for `add()`.
      field: the field of the train state that is shared.

    Returns:
      A place whose `run` is described above.

    Raises:
      TypeError: if an argument is not what it must be.
      ValueError: without devices; at `run`, if a number is out of range or a batch
        does not have K parts.
      FloatingPointError: at `run`, when the metric "loss" is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> from localsgd_jax import asynchronous
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.1),
      ...                            rule=lsgd.average())
      >>> place = asynchronous.on_threads(algorithm, devices=jax.devices()[:1] * 2)
      >>> batches = [jnp.array([1.0, 3.0])] * 12                   # 12 steps, K = 2
      >>> state, history = place.run(place.init(jnp.zeros(())), batches, every=4)
      >>> history["steps"].sum()
      np.int64(24)

    References:
      Stich, Local SGD Converges Fast and Communicates Little, 2019, Algorithm 2.
      arXiv:1805.09767
    """
    devices = list(jax.local_devices() if devices is None else devices)
    if not devices:
        raise ValueError("on_threads(devices): at least one is needed, got none")
    aggregation = check_aggregation("on_threads(aggregation)", aggregation)
    programs = _compile(algorithm, aggregation, field, len(devices))
    return Asynchronous(
        partial(start, algorithm, len(devices), aggregation, field),
        partial(_run, programs, devices),
        len(devices),
    )


def throughput(history: History) -> np.ndarray:
    """Returns the local steps per second of each worker.

    Args:
      history: from a run of `on_threads`.

    Returns:
      `(K,)` floats: the steps of a worker until its last exchange, by the time of
      that since the start; K counts the workers up to the last that exchanged.

    Example:
      >>> import numpy as np
      >>> throughput({"worker": np.array([0, 1, 0]), "steps": np.array([4, 4, 4]),
      ...             "seconds": np.array([1.0, 2.0, 4.0])})
      array([2., 2.])
    """
    worker = history["worker"]
    steps = np.bincount(worker, history["steps"])
    last = np.zeros(len(steps))
    np.maximum.at(last, worker, history["seconds"])
    return np.divide(steps, last, out=np.zeros_like(last), where=last > 0)


class _Programs(NamedTuple):
    """What is compiled; each runs where its arguments are."""

    advance: Callable
    difference: Callable
    apply: Callable
    adopt: Callable


def _compile(
    algorithm: Algorithm, aggregation: Aggregation, field: str, workers: int
) -> _Programs:
    """Makes the programs."""

    def apply(aggregate: PyTree, moved: PyTree, memory: PyTree, missed: jax.Array):
        return aggregation.apply(aggregate, moved, memory, Arrival(workers, missed))

    return _Programs(
        jax.jit(lambda worker, batches: jax.lax.scan(algorithm.step, worker, batches)),
        jax.jit(lambda worker, read: progress(get(worker, field), read)),
        jax.jit(apply),
        jax.jit(lambda worker, z, read: adopt(worker, field, z, read)),
    )


def _run(
    programs: _Programs,
    devices: list,
    state: AsyncState,
    batches: Iterable[PyTree],
    *,
    every: int | Callable | Sequence,
    steps: int | None = None,
    pause: Callable | None = None,
    chunk: int = 64,
) -> tuple[AsyncState, History]:
    """Starts the threads and waits until all have ended."""
    due = as_schedules("run(every)", every, len(devices))
    if steps is not None:
        steps = whole("run(steps)", steps)
    chunk = whole("run(chunk)", chunk)
    work = Work(itertools.islice(batches, steps), len(devices))
    desk = Desk(programs.apply, state, devices[0])
    # What jax.enable_x64 sets holds for one thread only.
    wide = jnp.result_type(float) == np.float64

    def live(k: int) -> tuple[PyTree, PyTree]:
        with jax.enable_x64(wide):
            own = jax.tree.map(lambda x: x[k], (state.workers, state.read))
            thread = _Thread(k, devices[k], programs, work, desk, due[k], chunk, pause)
            return thread.live(*jax.device_put(own, devices[k]))

    rows = jax.device_put(
        together(live, work.workers, work.lock, work.stop), devices[0]
    )
    workers, read = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    return AsyncState(desk.aggregate, desk.memory, workers, read), desk.history()


class _Thread(NamedTuple):
    """One worker's part of a run."""

    k: int
    device: Any
    programs: _Programs
    work: Work
    desk: Desk
    due: Callable
    chunk: int
    pause: Callable | None

    def live(self, worker: PyTree, read: PyTree) -> tuple[PyTree, PyTree]:
        """Takes rounds until there is no more work."""
        done, seen = 0, 0
        while True:
            began = time.perf_counter()
            worker, metrics = self.round(worker, done)
            if not (steps := sum(count for count, _ in metrics)):
                return worker, read
            done += steps
            if self.pause:
                self.work.stop.wait(self.pause(self.k, time.perf_counter() - began))
            moved = self.programs.difference(worker, read)
            row = {"worker": self.k, "steps": steps} | _means(metrics)
            aggregate, seen = self.desk.exchange(moved, seen, row)
            here = jax.device_put(aggregate, self.device)
            worker, read = self.programs.adopt(worker, here, read)

    def round(self, worker: PyTree, done: int) -> tuple[PyTree, list]:
        """Takes local steps until it is time to exchange, or work ends."""
        metrics = []
        while True:
            parts = self.work.take(self.until_due(done))
            if not parts:
                return worker, metrics
            batches = jax.device_put(jax.tree.map(stack, *parts), self.device)
            worker, measured = self.programs.advance(worker, batches)
            # A thread that queued rounds ahead would measure only its dispatches.
            jax.block_until_ready(worker)
            done += len(parts)
            metrics.append((len(parts), _numbers(self.k, done, measured)))
            if self.due(done):
                return worker, metrics

    def until_due(self, done: int) -> int:
        """Returns the steps until the next exchange, at most a chunk."""
        ahead = range(1, self.chunk + 1)
        return next((i for i in ahead if self.due(done + i)), self.chunk)


def _numbers(k: int, done: int, metrics: PyTree) -> dict[str, np.ndarray]:
    """Returns the metrics that are numbers, (H,) by name; refuses a bad loss."""
    named = {
        jax.tree_util.keystr(path, simple=True, separator=".") or "loss": (
            np.asarray(leaf)
        )
        for path, leaf in jax.tree.leaves_with_path(metrics)
        if leaf.ndim == 1
    }
    if not np.isfinite(named.get("loss", 0.0)).all():
        raise FloatingPointError(
            f"run(): the loss of worker {k} is not finite within its first {done} "
            "local steps"
        )
    return named


def _means(metrics: list[tuple[int, dict]]) -> dict[str, float]:
    """Returns the mean of each metric over a round."""
    names = metrics[0][1]
    return {
        name: float(np.concatenate([m[name] for _, m in metrics]).mean())
        for name in names
    }
