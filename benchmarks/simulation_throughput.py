"""Worker-steps per second of simulated local SGD on w8a, b = 4, H = 16.

Command: python -m benchmarks.simulation_throughput (1 minute; needs numba)
Expected on two cores: the library at least as fast as numba for K ≥ 128.

All programs take the same steps on the same examples and must give the same result:

    numpy     a loop over steps and workers, dense rows
    numba     the same compiled, over the sparse rows, parallel over the workers
    simulate  `localsgd_jax.simulate` on one device, on dense rows
    on_mesh   `localsgd_jax.on_mesh` on two CPU devices, on dense rows

The library is limited by the memory bandwidth of sampling rows. Their features are 0 or
1, so they are stored as int8 and as single bits besides float32.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

os.environ.setdefault("NPROC", "8")  # Two CPU devices need at least four threads.

import jax
import jax.numpy as jnp
import numba
import numpy as np
import optax

import localsgd_jax as lsgd
from localsgd_jax.experiments import datasets, logistic

BATCH, PERIOD, RATE = 4, 16, 1.0


class Problem(NamedTuple):
    """A dataset, as sparse and as dense rows, and the penalty."""

    dataset: datasets.Dataset
    dense: np.ndarray
    labels: np.ndarray
    l2: float


def load(data: str) -> Problem:
    dataset = datasets.load(data)
    dense = dataset.features.astype(np.float32).toarray()
    labels = dataset.labels.astype(np.float32)
    return Problem(dataset, dense, labels, logistic.penalty(dataset))


def numpy_rounds(problem: Problem, indices: np.ndarray) -> np.ndarray:
    """Returns the parameters after rounds on examples `(R, H, K, b)`."""
    dense, labels, l2 = problem.dense, problem.labels, np.float32(problem.l2)
    x = np.zeros((indices.shape[2], dense.shape[1]), np.float32)
    for of_round in indices:
        for of_step in of_round:
            for k, rows in enumerate(of_step):
                a, y = dense[rows], labels[rows]
                slope = y / (1 + np.exp(y * (a @ x[k])))
                x[k] += np.float32(RATE) * (slope @ a / BATCH - l2 * x[k])
        x[:] = x.mean(axis=0)
    return x


@numba.njit(parallel=True, fastmath=True)
def numba_round(x, indices, starts, columns, values, labels, rate, l2):
    steps, workers, batch = indices.shape
    for k in numba.prange(workers):
        params = x[k]
        slope = np.empty(batch, np.float32)
        for h in range(steps):
            for j in range(batch):
                i = indices[h, k, j]
                margin = np.float32(0)
                for p in range(starts[i], starts[i + 1]):
                    margin += values[p] * params[columns[p]]
                slope[j] = rate * labels[i] / (1 + np.exp(labels[i] * margin)) / batch
            params *= np.float32(1) - rate * l2
            for j in range(batch):
                i = indices[h, k, j]
                for p in range(starts[i], starts[i + 1]):
                    params[columns[p]] += slope[j] * values[p]
    mean = np.zeros(x.shape[1], np.float32)
    for k in range(workers):
        mean += x[k]
    mean /= np.float32(workers)
    for k in numba.prange(workers):
        x[k] = mean


def numba_rounds(problem: Problem, indices: np.ndarray) -> np.ndarray:
    rows, l2 = problem.dataset.features, np.float32(problem.l2)
    sparse = rows.indptr, rows.indices, rows.data.astype(np.float32)
    x = np.zeros((indices.shape[2], rows.shape[1]), np.float32)
    for round_indices in indices:
        numba_round(x, round_indices, *sparse, problem.labels, np.float32(RATE), l2)
    return x


def pack(dense: np.ndarray) -> np.ndarray:
    """Packs features that are 0 or 1 into words of 32 bits."""
    fill = -dense.shape[1] % 32
    bits = np.pad(dense.astype(np.uint8), ((0, 0), (0, fill)))
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint32)


def unpack(words: jax.Array, size: int) -> jax.Array:
    """Unpacks words `(…, m)` into features `(…, d)`, float32."""
    shifts = jnp.arange(32, dtype=jnp.uint32).reshape((1,) * words.ndim + (32,))
    bits = (words[..., None] >> shifts) & 1
    flat = bits.reshape(*words.shape[:-1], -1)[..., :size]
    return flat.astype(jnp.float32)


def library_rounds(
    problem: Problem, make_cluster: Callable, stored: np.ndarray
) -> Callable:
    """Returns the rounds of the library; rows are sampled on the device."""
    size, features = problem.dense.shape[1], jnp.asarray(stored)
    labels, loss = jnp.asarray(problem.labels), logistic.loss_fn(problem.dataset)
    algorithm = lsgd.local_sgd(loss, optax.sgd(RATE), lsgd.average())

    def load_rows(features, rows):
        if features.dtype == jnp.uint32:
            return unpack(features[rows], size)
        return features[rows].astype(jnp.float32)

    @partial(jax.jit, static_argnames="workers")
    def rounds(features, labels, indices, workers):
        cluster = make_cluster(algorithm, workers)

        def step(state, rows):
            batch = load_rows(features, rows), labels[rows]
            return cluster.step(state, batch)[0], None

        def one_round(state, rows):
            return cluster.sync(jax.lax.scan(step, state, rows)[0]), None

        start = cluster.init(jnp.zeros(size))
        return jax.lax.scan(one_round, start, indices)[0].workers.params

    return lambda problem, indices: np.asarray(
        rounds(features, labels, indices, indices.shape[2])
    )


def programs(problem: Problem) -> dict[str, Callable]:
    dense = problem.dense
    if not np.isin(dense, (0, 1)).all():
        raise SystemExit(f"{problem.dataset.name}: features must be 0 or 1")
    mesh = jax.make_mesh((jax.device_count(),), ("worker",))

    def on_two_devices(algorithm, workers):
        return lsgd.on_mesh(algorithm, mesh, workers)

    return {
        "numpy": numpy_rounds,
        "numba": numba_rounds,
        "simulate float32": library_rounds(problem, lsgd.simulate, dense),
        "simulate int8": library_rounds(problem, lsgd.simulate, dense.astype(np.int8)),
        "simulate bits": library_rounds(problem, lsgd.simulate, pack(dense)),
        "on_mesh bits": library_rounds(problem, on_two_devices, pack(dense)),
    }


def measure(problem: Problem, runs: dict, workers: int, options) -> dict[str, float]:
    """Returns worker-steps per second, the best of several interleaved repetitions."""
    count, rounds = len(problem.labels), max(1, options.work // (workers * PERIOD))
    shape = (rounds, PERIOD, workers, BATCH)
    indices = np.random.default_rng(0).integers(0, count, shape).astype(np.int32)
    test_indices = indices[:2]
    expected = numpy_rounds(problem, test_indices)
    seconds = dict.fromkeys(runs, np.inf)
    for name, run in runs.items():
        np.testing.assert_allclose(
            run(problem, test_indices), expected, atol=1e-4, err_msg=name
        )
    for _ in range(options.repeats):
        for name, run in runs.items():
            timed_indices = test_indices[:1] if name == "numpy" else indices
            run(problem, timed_indices)  # Compiles, and loads the data into the cache.
            start = time.perf_counter()
            run(problem, timed_indices)
            per_step = (time.perf_counter() - start) / (timed_indices.size / BATCH)
            seconds[name] = min(seconds[name], per_step)
    return {name: 1 / per_step for name, per_step in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="w8a")
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 128, 1024])
    parser.add_argument(
        "--work", type=int, default=2**19, help="worker-steps per repetition"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    problem = load(options.data)
    runs = programs(problem)
    print(f"million worker-steps per second, {os.cpu_count()} cores")
    print(f"{'K':>6}" + "".join(f"{name:>18}" for name in runs) + f"{'best/numba':>12}")
    for workers in options.workers:
        speed = measure(problem, runs, workers, options)
        cells = "".join(f"{speed[name] / 1e6:>18.3f}" for name in runs)
        ratio = max(list(speed.values())[2:]) / speed["numba"]
        print(f"{workers:>6}{cells}{ratio:>12.2f}", flush=True)


if __name__ == "__main__":
    main()
