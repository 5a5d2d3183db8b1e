"""Batches of sharded workers in two processes."""

import numpy as np
import optax
import pytest
from harness.process_jobs import run
from programs.batch_layout_worker import (
    WORKERS,
    initial_params,
    loss_fn,
    make_batches,
)

import localsgd_jax as lsgd


@pytest.mark.full
def test_processes_transfer_the_shards_of_their_devices():
    """Workers inside a process, and workers that span both."""
    results = run("batch_layout_worker.py", 2)
    assert [result["inside"]["rows"] for result in results] == [[0], [1]]
    assert [result["across"]["rows"] for result in results] == [[0, 1], [0, 1]]
    algorithm = lsgd.local_sgd(loss_fn, optax.sgd(0.1), rule=lsgd.average())
    cluster = lsgd.simulate(algorithm, WORKERS)
    _, history = lsgd.train(
        cluster,
        cluster.init(initial_params()),
        make_batches(),
        schedule=2,
        progress=False,
    )
    for result in results:
        for kind in ("inside", "across"):
            assert all(result[kind]["right"].values()), result[kind]["right"]
            np.testing.assert_allclose(result[kind]["loss"], history["loss"], rtol=1e-5)
