"""Child process: fault-tolerant training with batches of its own size.

    python unequal_batches_worker.py COORDINATOR_ADDRESS NUM_PROCESSES PROCESS_ID

Process p has p + 1 examples in each batch. Prints one line of JSON: the parameters.
"""

import json
import os
import sys

os.environ.setdefault("NPROC", "8")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from localsgd_jax import fault_tolerance
from localsgd_jax.execution.process_local import on_processes

STEPS = 3


def batches(process):
    """Returns the batches of the worker of a process, leaves (1, process + 1, 4)."""
    rng = np.random.default_rng(process)
    return [
        rng.normal(size=(1, process + 1, 4)).astype(np.float32) for _ in range(STEPS)
    ]


def loss_fn(w, batch):
    return 0.5 * jnp.mean(jnp.sum((w[None] - batch) ** 2, axis=1))


def main(coordinator, num_processes, process):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    lsgd.initialize(
        coordinator, int(num_processes), int(process), recoverable=True, timeout=60
    )
    algorithm = lsgd.local_sgd(loss_fn, optax.sgd(0.1), lsgd.average())
    cluster = on_processes(algorithm, lsgd.worker_mesh(), int(num_processes))
    state, _ = fault_tolerance.train(
        cluster,
        cluster.init(jnp.zeros(4)),
        batches(int(process)),
        schedule=1,
        progress=False,
    )
    params = np.asarray(state.workers.params)[0].tolist()
    print(json.dumps({"process": int(process), "params": params}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
