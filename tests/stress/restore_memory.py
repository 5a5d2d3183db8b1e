"""Memory of restoring sharded workers onto another number of workers, per process.

    cd tests && python -m stress.restore_memory --megabytes 32 128

Saves the state of four workers of two devices each (AdamW and DiLoCo) and restores it
into abstract templates under `localsgd launch`, on one to four processes. With one
device per process the memory of a process is that of a device. Writes
`docs/_data/restore_memory.json` and prints in MB, for the process with the largest
peak:

    stored     bytes of the checkpoint
    share      bytes of the restored state on the devices of a process
    peak       largest resident memory during `restore` minus that before
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

os.environ.setdefault("NPROC", "8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness.paths import ROOT
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import RunCheckpointer

LEAVES = 16
STORED = (4, 2)
# Number of processes, of workers, and of devices of each worker.
RESTORES = ((1, 2, 2), (2, 2, 2), (4, 2, 2), (4, 1, 4))
MAX_SECONDS = 300
DATA = ROOT / "docs" / "_data" / "restore_memory.json"


def make_cluster(workers, fsdp):
    """Returns a cluster and its mesh."""
    devices = np.array(jax.devices()[: workers * fsdp]).reshape(workers, fsdp)
    mesh = jax.sharding.Mesh(devices, ("worker", "fsdp"))
    algorithm = lsgd.local_sgd(
        lambda params, batch: sum(jnp.mean(x) for x in params) * jnp.mean(batch),
        optax.adamw(0.1),
        lsgd.diloco(),
    )
    return lsgd.on_mesh(algorithm, mesh), mesh


def initial_params(mesh, megabytes, abstract):
    """Returns parameters that are split over the devices of a worker."""
    shape = (megabytes * 2**20 // LEAVES // 4096, 1024)
    sharding = NamedSharding(mesh, P("fsdp"))
    if abstract:
        return [jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)] * LEAVES
    rng = np.random.default_rng(0)
    return [
        jax.device_put(rng.normal(size=shape).astype(np.float32), sharding)
        for _ in range(LEAVES)
    ]


def memory(field):
    """Returns a field of the memory of this process in MB, such as "VmRSS"."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def save(directory, megabytes):
    """Saves a checkpoint; returns its size in MB."""
    jax.config.update("jax_num_cpu_devices", STORED[0] * STORED[1])
    cluster, mesh = make_cluster(*STORED)
    state = cluster.init(initial_params(mesh, megabytes, abstract=False))
    with RunCheckpointer(directory, cluster) as checkpointer:
        checkpointer.save(state)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6


def restore(directory, megabytes, workers, fsdp):
    """Restores in this process of a job; prints share and peak in MB."""
    lsgd.initialize()
    cluster, mesh = make_cluster(workers, fsdp)
    template = cluster.init(initial_params(mesh, megabytes, abstract=True))
    with RunCheckpointer(directory, cluster, read_only=True) as checkpointer:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        state, _ = checkpointer.restore(template)
        jax.block_until_ready(state)
        peak = memory("VmHWM") - before
    shards = [x for leaf in jax.tree.leaves(state) for x in leaf.addressable_shards]
    share = sum(shard.data.nbytes for shard in shards) / 1e6
    print(json.dumps({"share": share, "peak": peak}), flush=True)


def measure(directory, megabytes, processes, workers, fsdp):
    """Restores in a job; returns the row of the process with the largest peak."""
    command = [sys.executable, "-m", "localsgd_jax", "launch", "-n", str(processes)]
    command += ["--devices-per-process", str(workers * fsdp // processes), "--"]
    command += [sys.executable, "-m", "stress.restore_memory", "--restore"]
    command += [str(workers), str(fsdp), "--megabytes", str(megabytes)]
    done = subprocess.run(
        [*command, "--directory", directory],
        capture_output=True,
        text=True,
        timeout=MAX_SECONDS,
    )
    lines = re.findall(r"^\[\d+\] (\{.*)", done.stdout, re.MULTILINE)
    if done.returncode or len(lines) != processes:
        raise RuntimeError(done.stderr[-2000:])
    row = max(map(json.loads, lines), key=lambda found: found["peak"])
    row = {name: round(value, 1) for name, value in row.items()}
    about = {"processes": processes, "workers": workers, "devices_of_each": fsdp}
    return about | row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--out", type=pathlib.Path, default=DATA)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    parser.add_argument("--restore", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if options.restore:
        restore(options.directory, *options.megabytes, *options.restore)
        return
    rows = []
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory() as directory:
            stored = {"stored": round(save(directory, megabytes), 1)}
            for case in RESTORES:
                rows.append(stored | measure(directory, megabytes, *case))
                print(rows[-1], flush=True)
    about = {"jax": jax.__version__, "stored_layout": STORED}
    options.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
