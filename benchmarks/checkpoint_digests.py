"""Cost of the digests of checkpoints as a share of saving and restoring.

    python -m benchmarks.checkpoint_digests --out DIRECTORY

saves and restores a state (AdamW and DiLoCo, two workers) of 28 MB and of 280 MB, on
one device and on four CPU devices with workers that are sharded over two. The digests
are timed within each `save` and `restore`, after a warm-up that compiles. A save ends
when the checkpoint is complete; `blocked` is the part until `save` returns. Prints
medians.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

os.environ.setdefault("NPROC", "8")  # JAX 0.10 and 0.11 may stall with fewer threads.

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from benchmarks import reporting
from localsgd_jax.checkpoint import RunCheckpointer, reader, run_checkpointer
from localsgd_jax.core.types import Cluster, State

WORKERS, LEAVES, COLUMNS = 2, 16, 256
# Copies of the parameters: with two moments for each worker, anchor and momentum.
COPIES = 3 * WORKERS + 2
SIZES_MB = (28, 280)
DEVICES = (1, 4)


def make_state(devices: int, megabytes: int) -> tuple[Cluster, State]:
    """Returns a cluster on some devices and a state of random numbers."""
    algorithm = lsgd.local_sgd(
        lambda params, batch: sum(jnp.mean(x) for x in params) * jnp.mean(batch),
        optax.adamw(0.1),
        rule=lsgd.diloco(),
    )
    rows = megabytes * 10**6 // (COPIES * LEAVES * 4 * COLUMNS)
    rng = np.random.default_rng(0)
    params: list[Any] = [
        rng.normal(size=(rows // 2 * 2, COLUMNS)).astype(np.float32)
        for _ in range(LEAVES)
    ]
    if devices == 1:
        cluster = lsgd.simulate(algorithm, WORKERS)
    else:
        grid = np.array(jax.devices()[:devices]).reshape(WORKERS, -1)
        mesh = Mesh(grid, ("worker", "fsdp"))
        cluster = lsgd.on_mesh(algorithm, mesh)
        params = jax.device_put(params, NamedSharding(mesh, P("fsdp")))
    state = cluster.init(params)
    perturbed = jax.tree.map(lambda x: x + (x.ndim > 1) * jnp.cos(x + 1), state)
    return cluster, jax.tree.map(lambda x, y: x.astype(y.dtype), perturbed, state)


@contextlib.contextmanager
def timed_digests() -> Iterator[list[float]]:
    """Yields a list to which each call of `leaf_digests` appends its seconds."""
    seconds: list[float] = []

    def timed(function: Callable) -> Callable:
        def call(leaves: Sequence[jax.Array], has_rows: Sequence[bool]) -> list:
            jax.block_until_ready(leaves)
            start = time.perf_counter()
            digests = function(leaves, has_rows)
            seconds.append(time.perf_counter() - start)
            return digests

        return call

    with contextlib.ExitStack() as stack:
        for module in (run_checkpointer, reader):
            replaced = timed(module.leaf_digests)
            stack.enter_context(mock.patch.object(module, "leaf_digests", replaced))
        yield seconds


def save_and_restore(cluster: Cluster, state: State) -> dict[str, float]:
    """Returns the seconds of a save, a restore, and of their digests."""
    with tempfile.TemporaryDirectory() as directory, timed_digests() as digests:
        checkpointer = RunCheckpointer(directory, cluster)
        start = time.perf_counter()
        checkpointer.save(state)
        blocked = time.perf_counter() - start
        checkpointer.close()
        seconds = {"save": time.perf_counter() - start, "blocked": blocked}
        seconds["save_digests"] = sum(digests)
        digests.clear()
        with RunCheckpointer(directory, cluster, read_only=True) as checkpointer:
            start = time.perf_counter()
            jax.block_until_ready(checkpointer.restore(state))
            seconds["restore"] = time.perf_counter() - start
        return seconds | {"restore_digests": sum(digests)}


def measure(devices: int, megabytes: int, repeats: int) -> dict[str, float]:
    """Returns a row of medians over some repetitions."""
    cluster, state = make_state(devices, megabytes)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    save_and_restore(cluster, state)
    runs = [save_and_restore(cluster, state) for _ in range(repeats)]
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}

    def share(digests: str, total: str) -> float:
        return 100 * statistics.median(run[digests] / run[total] for run in runs)

    return {
        "devices": devices,
        "megabytes": round(size, 1),
        "save_s": median["save"],
        "blocked_s": median["blocked"],
        "digests_s": median["save_digests"],
        "share_of_save_%": share("save_digests", "save"),
        "restore_s": median["restore"],
        "share_of_restore_%": share("restore_digests", "restore"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=SIZES_MB)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    rows = [
        measure(devices, megabytes, options.repeats)
        for megabytes in options.megabytes
        for devices in DEVICES
    ]
    print(reporting.format_table(rows))
    if options.out:
        result = {"name": "checkpoint_digests", "machine": reporting.machine()}
        text = json.dumps(result | {"rows": rows}, indent=2) + "\n"
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "checkpoint_digests.json").write_text(text)


if __name__ == "__main__":
    main()
