"""A batch without a row for each worker raises in `train`."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import mesh
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax import fault_tolerance
from localsgd_jax.execution import on_processes

ALGORITHM = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.1))
TRAIN = {
    "simulate": lambda batches: lsgd.train(
        *started(lsgd.simulate(ALGORITHM, 4)), batches, schedule=2, progress=False
    ),
    "mesh": lambda batches: lsgd.train(
        *started(lsgd.on_mesh(ALGORITHM, mesh(worker=4))),
        batches,
        schedule=2,
        progress=False,
    ),
    "fault tolerant": lambda batches: fault_tolerance.train(
        *started(on_processes(ALGORITHM, mesh(worker=4))),
        batches,
        schedule=2,
        progress=False,
    ),
}


def started(cluster):
    return cluster, cluster.init(jnp.zeros(()))


@pytest.mark.parametrize(
    "call", ["simulate", *map(in_full, ("mesh", "fault tolerant"))]
)
@pytest.mark.parametrize("shape", [(3,), (), (0,), (5, 4)])
def test_batches_without_a_row_per_worker_raise(call, shape):
    message = r"train\(batches\): the leading axis of every leaf must be the 4 workers"
    with pytest.raises(ValueError, match=message):
        TRAIN[call]([np.ones(shape, np.float32)] * 4)


def test_second_batch_is_checked():
    with pytest.raises(ValueError, match=r"train\(batches\): .*got shape \(2,\)"):
        TRAIN["simulate"]([np.ones(4, np.float32), np.ones(2, np.float32)])
