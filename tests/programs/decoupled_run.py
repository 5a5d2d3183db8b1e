"""Runs a decoupled job on Ray; prints rows and the result as lines of JSON.

With the setting `nodes`, the CPUs of each node, it starts a Ray cluster of these nodes
and a head node without CPUs, and a further node of C CPUs for each line "C" on stdin.
"""

import atexit
import functools
import json
import os
import sys
import threading
import time

import jax
import numpy as np
from harness.decoupled_jobs import BATCH, data, full_loss, make_job
from harness.decoupled_jobs import batches as batches_of_one_worker

import localsgd_jax as lsgd
from localsgd_jax import decoupled

DEVICES = 2  # Of each process, where a learner has several.

ENVIRONMENT = {
    "JAX_NUM_CPU_DEVICES": str(DEVICES),
    "JAX_PLATFORMS": "cpu",
    "NPROC": "16",
    "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}


# A node that is stopped is found dead after some seconds.
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 2000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 5,
}


def start_cluster(nodes):
    """Starts a Ray cluster and a thread that adds nodes; returns its address."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "_system_config": HEALTH_CHECKS}
    # Hooks at exit would need the main thread, which does not add the nodes.
    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    atexit.register(cluster.shutdown)

    def add_node(cpus):
        node = cluster.add_node(wait=False, num_cpus=int(cpus))
        raylet = node.all_processes["raylet"][0].process
        # The workers of a raylet that is a zombie do not notice its end.
        threading.Thread(target=raylet.wait, daemon=True).start()
        print(json.dumps({"raylet": raylet.pid}), flush=True)

    def add_nodes():
        for line in sys.stdin:
            add_node(line)

    for cpus in nodes:
        add_node(cpus)
    threading.Thread(target=add_nodes, daemon=True).start()
    return cluster.address


def on_all_devices(workers, algorithm):
    """Places the workers of a learner on the devices of all its processes."""
    return lsgd.on_mesh(algorithm, lsgd.worker_mesh(), workers)


def batches_of_workers(workers, learner, start):
    """Yields batches of all workers of a learner."""
    seen = start * workers * BATCH
    return lsgd.shuffled_batches(data(), workers, BATCH, examples_seen=seen)


def write_start(directory, learner):
    """Appends time and process id to the file of a learner, if it is a new process."""
    with open(os.path.join(directory, f"learner-{learner}"), "a+") as file:
        file.seek(0)
        if not file.read().endswith(f" {os.getpid()}\n"):
            file.write(f"{time.monotonic()} {os.getpid()}\n")


def main():
    settings = json.loads(sys.argv[1])
    if nodes := settings.pop("nodes", None):
        settings["address"] = start_cluster(nodes)
    if isinstance(settings["learners"], list):
        settings["learners"] = tuple(settings["learners"])
    pause, slow = settings.pop("pause", 0.02), settings.pop("slow", {})
    starts = settings.pop("starts", None)

    def paused_batches(learner, start):
        if starts is not None:
            write_start(starts, learner)
        for batch in batches(learner, start):
            time.sleep(pause * slow.get(str(learner), 1))
            yield batch

    policy = decoupled.immediate()
    if "quorum" in settings:
        policy = decoupled.quorum(*settings.pop("quorum"))
    bits = settings.pop("bits", None)
    changes = {"compress": decoupled.integers(bits, 8)} if bits else {}
    if (processes_of_learner := settings.get("processes", 1)) > 1:
        workers = DEVICES * processes_of_learner
        changes["cluster"] = functools.partial(on_all_devices, workers)
        batches = functools.partial(batches_of_workers, workers)
    else:
        batches = batches_of_one_worker
    names = ("steps", "fragments", "overlap", "exchanges", "every")
    changes |= {name: settings.pop(name) for name in names if name in settings}
    job = make_job(merge=policy, batches=paused_batches, **changes)

    def record(row):
        print(json.dumps({"row": row}), flush=True)

    start = time.monotonic()
    params, history = decoupled.run(
        job,
        settings.pop("learners"),
        environment=ENVIRONMENT,
        record=record,
        progress=False,
        **settings,
    )
    result = {
        "seconds": time.monotonic() - start,
        "loss": full_loss(params),
        "steps": int(history["steps"][history["fragment"] == 0][-1]),
        "reissued": int(history["reissued"].max()),
        "duplicates": int(history["duplicates"].max()),
    }
    if directory := settings.get("checkpoint"):
        log = decoupled.read_log(job, directory)
        repeated, _ = decoupled.replay(job, log)
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(repeated), strict=True)
        result["equal"] = all(np.array_equal(a, b) for a, b in pairs)
        if processes_of_learner == 1:
            plain = make_job(merge=policy, **changes)
            recomputed = decoupled.recompute(plain, log)
            result["recomputed"] = recomputed.equal
            result["different"] = len(recomputed.different)
    print(json.dumps({"result": result}), flush=True)


if __name__ == "__main__":
    main()
