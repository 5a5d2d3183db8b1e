"""Asynchronous Local SGD on threads: history, delays, errors, and convergence."""

import functools
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import reference_sgd
from harness.asynchronous_cases import (
    DIMENSION,
    gaussian_batches,
    host_batches,
    integer_batches,
    linear_loss,
    make_algorithm,
    thread_cluster,
)
from harness.cases import assert_same, mesh
from harness.reference_sgd import logistic_loss
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax import asynchronous


@pytest.mark.parametrize(
    "schedule",
    [
        in_full(1, id="1"),
        in_full(4, id="4"),
        in_full(lsgd.never(), id="never"),
        pytest.param([1, 2, 3, 5], id="per_worker"),
    ],
)
def test_every_update_is_applied_once(schedule):
    cluster = thread_cluster(linear_loss, 1.0)
    batches = integer_batches(13, 4)
    state, history = cluster.run(cluster.init(jnp.ones(3)), batches, schedule=schedule)
    assert history["steps"].sum() == 52
    np.testing.assert_array_equal(state.aggregate, 1 - batches.sum(axis=(0, 1)) / 4)


def test_slow_worker_does_not_block_others():
    """Worker 0 stays in its first round until the other workers have completed 30."""
    completed, is_first_round = threading.Semaphore(0), [True]

    def delay_fn(worker, seconds):
        if worker:
            completed.release()
        elif is_first_round:
            is_first_round.clear()
            for _ in range(30):
                assert completed.acquire(timeout=120)
        return 0.0

    cluster = thread_cluster()
    start = cluster.init(jnp.ones(DIMENSION))
    _, history = cluster.run(start, host_batches(40), schedule=2, delay_fn=delay_fn)
    first = int(np.argmax(history["worker"] == 0))
    assert first >= 27  # three workers may have been delayed and not yet pushed
    assert history["staleness"][first] == first
    assert history["steps"].sum() == 160


def test_worker_of_quarter_speed_takes_fewer_steps():
    def delay_fn(worker, seconds):
        assert seconds > 0
        return 3 * max(seconds, 0.02) if worker == 0 else 0.0

    cluster = thread_cluster()
    state = cluster.init(jnp.ones(DIMENSION))
    state, _ = cluster.run(state, host_batches(8), schedule=4)
    state, history = cluster.run(
        state, host_batches(160), schedule=4, delay_fn=delay_fn
    )
    steps = np.bincount(history["worker"], history["steps"], 4)
    assert steps.sum() == 640 and 1.5 * steps[0] < min(steps[1:])
    assert (np.diff(history["seconds"]) >= 0).all()
    assert np.isfinite(asynchronous.throughput(history)).all()


def test_history_columns():
    cluster = thread_cluster()
    state = cluster.init(jnp.ones(DIMENSION))
    periods = [10, 5, 10, 10]
    state, history = cluster.run(
        state,
        iter(host_batches(50)),
        schedule=periods,
        steps=11,
        max_steps_per_dispatch=4,
    )
    assert set(history) == {"worker", "steps", "loss", "staleness", "seconds"}
    assert history["steps"].sum() == 44
    # Only the last round of a worker may be shorter, at the end of the queue.
    for k, period in enumerate(periods):
        steps = history["steps"][history["worker"] == k]
        assert (steps[:-1] == period).all() and (steps <= period).all()
    # The staleness of an update is the number of updates since the worker's last one.
    for k in range(4):
        rows = np.flatnonzero(history["worker"] == k)
        gaps = np.diff(np.concatenate([[-1], rows])) - 1
        np.testing.assert_array_equal(history["staleness"][rows], gaps)
    assert cluster.num_workers == 4 and state.workers.params.shape == (4, DIMENSION)


def test_final_params_are_last_pulled():
    cluster = thread_cluster()
    state, history = cluster.run(
        cluster.init(jnp.ones(DIMENSION)), host_batches(12), schedule=3
    )
    assert_same(state.workers.params, state.last_read)
    assert_same(state.last_read[history["worker"][-1]], state.aggregate)


def test_threads_use_x64_setting_of_caller():
    with jax.enable_x64(True):
        cluster = thread_cluster()
        batches = list(zip(*gaussian_batches(8, 4), strict=True))
        start = cluster.init(np.ones(DIMENSION))
        state, _ = cluster.run(start, batches, schedule=2)
        assert state.aggregate.dtype == state.workers.params.dtype == jnp.float64


def test_several_workers_on_one_device_and_empty_queue():
    algorithm = make_algorithm(linear_loss)
    cluster = asynchronous.on_threads(algorithm, jax.devices()[:1] * 3)
    start = cluster.init(jnp.ones(3))
    rows = jnp.arange(9.0).reshape(3, 3)
    start = start._replace(workers=start.workers._replace(params=rows), last_read=rows)
    state, history = cluster.run(start, [], schedule=2)
    assert_same(state, start)
    assert history == {}
    _, history = cluster.run(start, integer_batches(6, 3), schedule=2)
    assert history["steps"].sum() == 18


class BrokenError(Exception):
    """Raised on purpose."""


def raising_delay(worker, seconds):
    if worker == 2:
        raise BrokenError
    return 1e4


def interrupting_delay(worker, seconds):
    if worker == 2:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    return 1e4


def raising_batches():
    yield from host_batches(4)
    raise BrokenError


@pytest.fixture
def default_sigint():
    """Restores the SIGINT handler, which background processes may ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "error, loss_fn, batches, delay_fn",
    [
        (BrokenError, None, lambda: host_batches(40), raising_delay),
        (BrokenError, None, raising_batches, None),
        (KeyboardInterrupt, None, lambda: host_batches(40), interrupting_delay),
        (FloatingPointError, linear_loss, lambda: np.nan * integer_batches(9, 4), None),
        in_full(
            FloatingPointError,
            linear_loss,
            lambda: 9 * [np.full((4, 3), 1e38, "f4")],
            None,
        ),
        in_full(
            ValueError, linear_loss, lambda: [np.ones((4, 3)), np.ones((5, 3))], None
        ),
    ],
)
def test_error_in_one_thread_ends_all(
    error, loss_fn, batches, delay_fn, default_sigint
):
    """Delayed threads wake up; otherwise the test would take hours."""
    cluster = thread_cluster(loss_fn, 1.0) if loss_fn else thread_cluster()
    start = cluster.init(jnp.ones(3 if loss_fn else DIMENSION))
    before = threading.active_count()
    with pytest.raises(error):
        cluster.run(start, batches(), schedule=2, delay_fn=delay_fn)
    assert threading.active_count() == before


@functools.cache
def breast_cancer():
    """Standardised examples, labels, and f* of logistic regression with λ = 0.01."""
    from sklearn.datasets import load_breast_cancer

    rows, classes = load_breast_cancer(return_X_y=True)
    rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    labels = 2.0 * classes - 1
    x = np.zeros(rows.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(labels * (rows @ x)))
        hessian = (rows.T * (p * (1 - p))) @ rows / len(rows) + 0.01 * np.eye(len(x))
        x -= np.linalg.solve(hessian, reference_sgd.logistic_gradient(x, rows, labels))
    assert np.linalg.norm(reference_sgd.logistic_gradient(x, rows, labels)) < 1e-12
    return rows, labels, objective(x, rows, labels)


def objective(x, rows, labels):
    return np.mean(np.logaddexp(0, -labels * (rows @ x))) + 0.005 * x @ x


def compare_with_synchronous(seeds, steps, timed=1, period=8, workers=4, slowdown=4.0):
    """Runs both methods with worker 0 slowed down, at equal gradient evaluations.

    The synchronous method waits for the straggler: the host sleeps after each round in
    the first `timed` runs. The sleep does not affect the parameters.

    Returns:
      f − f* of both methods for each seed, (seeds, 2), and local steps per second of
      both, (timed, 2).
    """
    rows, labels, best = breast_cancer()
    algorithm = make_algorithm(logistic_loss, optax.sgd(0.02))
    synchronous_cluster = lsgd.on_mesh(algorithm, mesh(worker=workers))
    one_round = jax.jit(lsgd.fused(synchronous_cluster))
    threads = thread_cluster(logistic_loss, 0.02, workers)

    def run_synchronous(batches, waits):
        state = synchronous_cluster.init(jnp.zeros(rows.shape[1]))
        began = time.perf_counter()
        for i in range(0, len(batches), period):
            start = time.perf_counter()
            stacked = jax.tree.map(lambda *x: np.stack(x), *batches[i : i + period])
            stacked = synchronous_cluster.shard_batch(stacked, time=True)
            state, metrics = one_round(state, stacked)
            jax.block_until_ready((state, metrics))
            if waits:
                time.sleep((slowdown - 1) * (time.perf_counter() - start))
        return lsgd.consensus(state), time.perf_counter() - began

    def run_asynchronous(batches):
        state, history = threads.run(
            threads.init(jnp.zeros(rows.shape[1])),
            batches,
            schedule=period,
            delay_fn=lambda k, seconds: 0.0 if k else (slowdown - 1) * seconds,
        )
        assert history["steps"].sum() == workers * len(batches)
        return state.aggregate, history["seconds"][-1]

    examples = rows.astype(np.float32), labels.astype(np.float32)
    gaps, speeds = [], []
    for i, seed in enumerate((0, *seeds)):
        stream = lsgd.shuffled_batches(examples, workers, 16, seed=seed)
        batches = [next(stream) for _ in range(steps if i else 4 * period)]
        x, waiting = run_synchronous(batches, i <= timed)
        z, seconds = run_asynchronous(batches)
        gaps.append([objective(np.float64(end), rows, labels) - best for end in (x, z)])
        speeds.append(workers * steps / np.array([waiting, seconds]))
    # The first run compiles and is not counted.
    return np.array(gaps[1:]), np.array(speeds[1 : timed + 1])


@pytest.mark.full
def test_convergence_matches_synchronous_run(record_property):
    gaps, speeds = compare_with_synchronous(range(5), steps=600)
    ratios = gaps[:, 1] / gaps[:, 0]
    record_property("local steps per second", speeds.mean(axis=0).tolist())
    record_property("f − f*, asynchronous / synchronous", ratios.tolist())
    # Far from the minimum, delayed updates act like momentum. On a busy host, where an
    # update may be very late, a single seed may therefore be more than 5 % better.
    assert (ratios < 1.05).all() and abs(np.median(ratios) - 1) < 0.05, ratios
    assert (gaps < 0.03).all()  # 0.59 at the start


def run_on_threads(batches, **options):
    cluster = thread_cluster(linear_loss, 1.0, workers=2)
    return cluster.run(cluster.init(jnp.ones(3)), batches, **options)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: asynchronous.on_threads(make_algorithm(linear_loss), []),
            ValueError,
            r"on_threads\(devices\): at least one is needed, got none",
        ),
        (
            lambda: asynchronous.on_threads(make_algorithm(linear_loss), None, 3),
            TypeError,
            r"on_threads\(aggregation\): an Aggregation is needed.*got 3",
        ),
        (
            lambda: run_on_threads(integer_batches(4, 3), schedule=2),
            ValueError,
            r"run\(batches\): the leading axis.*the 2 workers, got shape \(3, 3\)",
        ),
        (
            lambda: run_on_threads(integer_batches(4, 2), schedule=2.5),
            TypeError,
            r"run\(schedule\): a period or a schedule is needed, got 2.5",
        ),
        (
            lambda: run_on_threads(integer_batches(4, 2), schedule=2, steps=0),
            ValueError,
            r"run\(steps\): \w+ must be at least 1, got 0",
        ),
        in_full(
            lambda: run_on_threads(
                integer_batches(4, 2), schedule=2, max_steps_per_dispatch=0
            ),
            ValueError,
            r"run\(max_steps_per_dispatch\): \w+ must be at least 1, got 0",
        ),
    ],
)
def test_invalid_thread_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
