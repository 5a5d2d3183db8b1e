"""Process of a job that trains and counts the bytes that its sockets send.

    python socket_bytes_worker.py COORDINATOR PROCESSES PROCESS

Prints a line of JSON: bytes sent in local steps and in rounds, and the bytes of the
collectives in the compiled step.
"""

import json
import os
import socket
import struct
import sys
import time

os.environ.setdefault("NPROC", "8")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from localsgd_jax.analysis import total_bytes_sent

SIDE, ROUNDS, PERIOD = 600, 5, 3


def bytes_sent():
    """Returns the bytes sent on all TCP connections of this process."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.islink(path) and os.readlink(path).startswith("socket:"):
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            # tcpi_bytes_sent of struct tcp_info, since Linux 4.19.
            total += struct.unpack_from("Q", info, 200)[0]
    return total


def wait_until_sent():
    """Waits until the kernel has sent all buffered bytes; returns their number."""
    count = bytes_sent()
    while True:
        time.sleep(0.05)
        before, count = count, bytes_sent()
        if count == before:
            return count


def main(coordinator, processes, process):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator, processes, process, initialization_timeout=60
    )
    mesh = jax.make_mesh((processes,), ("worker",))
    algorithm = lsgd.local_sgd(
        lambda w, x: jnp.mean((x @ w) ** 2), optax.sgd(0.01), rule=lsgd.average()
    )
    cluster = lsgd.on_mesh(algorithm, mesh)
    state = cluster.init(np.ones((SIDE, SIDE), np.float32))
    batch = cluster.shard_batch(np.ones((processes, 2, SIDE), np.float32))
    step = jax.jit(lsgd.gated(cluster, lsgd.every(PERIOD))).lower(state, batch)
    step = step.compile()
    state, metrics = jax.block_until_ready(step(state, batch))
    counts = {False: 0, True: 0}
    for i in range(1, PERIOD * ROUNDS):
        before = wait_until_sent()
        state, metrics = jax.block_until_ready(step(state, batch))
        counts[(i + 1) % PERIOD == 0] += wait_until_sent() - before
    least, most = total_bytes_sent(lsgd.collective_ops(step), "worker")
    row = {
        "process": process,
        "local": counts[False],
        "round": counts[True] / ROUNDS,
        "collectives": [least, most],
        "sent": cluster.bytes_sent(state),
    }
    print(json.dumps(row), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
