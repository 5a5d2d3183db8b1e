"""Dispatches: number of programs, reading in advance, and dispatches in flight."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import optax
import pytest
from harness.cases import WORKERS, batches, cluster, loss_fn, network

import localsgd_jax as lsgd
from localsgd_jax.training.dispatch import DispatchResult, ResultQueue


def test_host_reads_batches_while_devices_compute(monkeypatch):
    """Batches of the second dispatch are read before the metrics of the first."""
    workers = cluster("simulate", "average")
    log, to_host = [], DispatchResult.to_host

    def logged(self):
        log.append("metrics")
        return to_host(self)

    monkeypatch.setattr(DispatchResult, "to_host", logged)
    stream = (log.append("batch") or batch for batch in batches(12))
    lsgd.train(
        workers,
        workers.init(network()),
        stream,
        schedule=4,
        max_steps_per_dispatch=4,
        progress=False,
    )
    assert log[: log.index("metrics")].count("batch") == 8


def make_result(value, due):
    return DispatchResult(due, {"loss": np.full((1, 2), value)}, {}, None)


def values(results):
    return [float(result.metrics["loss"][0, 0]) for result in results]


def test_results_are_read_one_dispatch_late():
    queue = ResultQueue(is_multi_process=False)
    assert queue.push(make_result(1, (False,))) == []
    assert values(queue.push(make_result(2, (True,)))) == [1]
    assert values(queue.pop_all()) == [2]
    assert queue.pop_all() == []


def test_several_processes_read_once_per_round():
    """Reading is a collective there."""
    queue = ResultQueue(is_multi_process=True)
    assert queue.push(make_result(1, (False,))) == []
    assert queue.push(make_result(2, (True,))) == []
    assert values(queue.push(make_result(3, (False,)))) == [1, 2]
    assert queue.push(make_result(4, (False,))) == []
    assert values(queue.pop_all()) == [3, 4]


@pytest.mark.full
def test_number_of_programs_is_bounded():
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    workers = lsgd.simulate(
        lsgd.local_sgd(counted, optax.sgd(0.1), rule=lsgd.average()), WORKERS
    )
    lsgd.train(
        workers,
        workers.init(network()),
        batches(200),
        schedule=lsgd.geometric(16, rounds=3),
        max_steps_per_dispatch=16,
        progress=False,
    )
    assert len(traces) <= 1  # Every program reuses the step that was traced first.


# The local step is slow enough for the host to dispatch faster than devices compute.
MANY_ROUNDS = """
    import jax, jax.numpy as jnp, numpy as np, optax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    import localsgd_jax as lsgd

    def loss_fn(w, batch):
        return jnp.mean((batch @ jnp.linalg.matrix_power(jnp.outer(w, w), 8)) ** 2)

    made = lsgd.local_sgd(loss_fn, optax.sgd(1e-9), rule=lsgd.average())
    cluster = lsgd.on_mesh(made, jax.make_mesh((8,), ("worker",)))
    state = cluster.init(np.full(128, 0.01, np.float32))
    batch = np.ones((8, 4, 128), np.float32)
    state, history = lsgd.train(
        cluster,
        state,
        (batch for _ in range(1000)),
        schedule=2,
        max_steps_per_dispatch=2,
        progress=False,
    )
    print(len(history["round"]))
"""


@pytest.mark.full
def test_many_rounds_do_not_starve_the_cpu():
    """Without NPROC, JAX 0.10 and 0.11 abort if 500 rounds are in flight."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("NPROC", "PJRT_NPROC")
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MANY_ROUNDS)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["500"]
