"""Child process: process-local rounds with blocking, late and weighted syncs.

    python process_local_worker.py COORDINATOR_ADDRESS NUM_PROCESSES PROCESS_ID

Prints one line of JSON: parameters of the local workers after each kind of run.
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
from localsgd_jax.distributed.background import submit_daemon
from localsgd_jax.execution.process_local import merge_late_sync, on_processes

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_enable_preemption_service", False)

WORKERS, PERIOD, ROUNDS = 6, 3, 5
DATA = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
# Functions, since optax.sgd initialises the backend, which must follow initialize().
RULES = {
    "average": lsgd.average,
    "diloco": lsgd.diloco,
    "fields": lambda: {
        "params": lsgd.quantize(lsgd.average(), 8),
        "opt_state": lsgd.floating_only(lsgd.average()),
    },
}


def loss_fn(params, batch):
    return jnp.mean((batch @ params["w"] - params["b"]) ** 2)


def algorithm(rule):
    return lsgd.local_sgd(loss_fn, optax.adam(0.05), rule=rule)


def keyed_algorithm():
    """An algorithm with one PRNG key per worker."""
    return lsgd.from_train_step(lambda state, batch: (state, {}), rule=lsgd.average())


def initial_params():
    return {"w": jnp.ones(4), "b": jnp.zeros(())}


def round_batches():
    """The batches of all rounds: leaves (H, K, B, ...)."""
    stream = lsgd.shuffled_batches(DATA, workers=WORKERS, batch=2)
    return [np.stack([next(stream) for _ in range(PERIOD)]) for _ in range(ROUNDS)]


def run_blocking(cluster, rows):
    """Waits for every synchronisation."""
    state = cluster.init(initial_params())
    for stacked in round_batches():
        state, _ = cluster.local_steps(state, stacked[:, rows])
        report = [float(jax.process_index()), 0.5]
        state, reports = cluster.sync(state, report)
        assert reports[:, 0].tolist() == list(range(jax.process_count())), reports
    return state


def run_overlapped(cluster, rows):
    """Computes a round during the synchronisation of the previous one."""
    state, in_flight, snapshot = cluster.init(initial_params()), None, None
    for stacked in round_batches():
        state, _ = cluster.local_steps(state, stacked[:, rows])
        if in_flight:
            synced, _ = in_flight.result(timeout=60)
            state = merge_late_sync(synced, state, snapshot)
        in_flight, snapshot = submit_daemon(cluster.sync, state), state
    in_flight.result(timeout=60)
    return state


def run_weighted(cluster, rows):
    """Synchronises once with weights that depend on the process."""
    state = cluster.init(initial_params())
    state, _ = cluster.local_steps(state, round_batches()[0][:, rows])
    return cluster.sync(state, [1.0 + jax.process_index()], weighted=True)[0]


RUNS = {
    "blocking": run_blocking,
    "overlapped": run_overlapped,
    "weighted": run_weighted,
}


def to_lists(tree):
    return jax.tree.map(lambda x: np.asarray(x).tolist(), tree)


def main(address, num_processes, process_id):
    jax.distributed.initialize(
        address, num_processes, process_id, initialization_timeout=60
    )
    mesh = jax.make_mesh((num_processes,), ("worker",))
    per_process = WORKERS // num_processes
    rows = slice(process_id * per_process, (process_id + 1) * per_process)
    keyed = on_processes(keyed_algorithm(), mesh, WORKERS)
    keys = {"params": jnp.zeros(()), "key": jax.random.key(3)}
    keys = keyed.init(keys).workers["key"]
    results = {"keys": jax.random.key_data(keys).tolist()}
    for name, rule in RULES.items():
        cluster = on_processes(algorithm(rule()), mesh, WORKERS)
        for kind, run in RUNS.items():
            state = run(cluster, rows)
            results[f"{name} {kind}"] = to_lists(state.workers.params)
        results["local_workers"] = lsgd.local_workers(cluster).tolist()
        results[f"{name} mean"] = to_lists(cluster.mean(state.workers.params))
    print(json.dumps(results), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
