"""The GPT of text.py with each worker sharded over two devices.

    python examples/sharded_workers.py

trains 4 workers of 2 devices each (8 CPU devices if there is no accelerator), with
parameters and moments sharded within the worker, then 4 workers of one device each, and
compares the losses: 1 minute on two cores. Expected: each device holds, and sends in a
synchronisation, 0.57 of a worker's parameters, and the losses of both runs differ by
less than 1e-4 bits per byte. Requires the extra `examples`.

    localsgd launch -n 2 --devices-per-process 4 -- python examples/sharded_workers.py

does the same in two processes.
"""

import argparse
import functools
import os
from typing import NamedTuple

os.environ.setdefault("NPROC", "32")  # JAX 0.10 and 0.11 starve with fewer threads.

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from text import Gpt, load, make_optimizer, train_step

import localsgd_jax as lsgd
from localsgd_jax.flax import NnxTrainState, from_nnx

# The first layer of each pair is sharded by columns and the second by rows, so no
# collective is needed between the two (Megatron-LM).
PARTITION_SPECS = {
    "qkv": P(None, "model"),
    "out": P("model", None),
    "up": P(None, "model"),
    "down": P("model", None),
}


class Result(NamedTuple):
    """Losses and parameter fraction of one run.

    Attributes:
      losses: mean bits per byte of each round, `(R,)`.
      device_fraction: fraction of a worker's parameter bytes on one device.
    """

    losses: np.ndarray
    device_fraction: float


def shard_params(initial: NnxTrainState, mesh: jax.sharding.Mesh) -> NnxTrainState:
    """Shards kernels and their optimizer moments over the mesh axis "model"."""

    def put(path: tuple, leaf: jax.Array) -> jax.Array:
        names = [getattr(key, "key", None) for key in path]
        specs = (PARTITION_SPECS[name] for name in names if name in PARTITION_SPECS)
        return jax.device_put(leaf, NamedSharding(mesh, next(specs, P())))

    return jax.tree.map_with_path(put, initial)


def run(
    train: np.ndarray,
    *,
    workers: int,
    shards: int,
    steps: int = 96,
    period: int = 8,
    batch: int = 8,
) -> Result:
    """Trains workers of `shards` devices each."""
    mesh = lsgd.worker_mesh(workers, inner_axes={"model": shards})
    model = Gpt(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make_optimizer("adamw", steps), wrt=nnx.Param)
    algorithm, initial = from_nnx(train_step, model, optimizer)
    cluster = lsgd.on_mesh(algorithm, mesh)
    state = cluster.init(shard_params(initial, mesh))
    device_bytes = sum(
        leaf.addressable_shards[0].data.nbytes
        for leaf in jax.tree.leaves(state.workers.params)
    )
    worker_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(initial.params))
    _, history = lsgd.train(
        cluster,
        state,
        lsgd.shuffled_batches(train, workers=workers, batch=batch),
        schedule=period,
        steps=steps,
        progress=False,
    )
    return Result(history["loss"], device_bytes / worker_bytes)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", help="text file; the help texts of Python if None")
    add("--workers", type=int, default=4, help="number of workers, K")
    add("--shards", type=int, default=2, help="devices per worker")
    add("--steps", type=int, default=96, help="local steps per worker")
    add("--period", type=int, default=8, help="local steps per round, H")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[Result]:
    """Trains sharded and unsharded workers and prints the results of both."""
    options = parse_options(arguments)
    # Without `localsgd launch` there is one process, which needs all devices.
    if lsgd.initialize(config=vars(options)) == 1:
        jax.config.update("jax_num_cpu_devices", 8)
    is_first = jax.process_index() == 0
    log = functools.partial(print, flush=True) if is_first else lambda line: None
    train, _ = load(options.data, length=64)
    results = []
    for shards in (options.shards, 1):
        result = run(
            train,
            workers=options.workers,
            shards=shards,
            steps=options.steps,
            period=options.period,
        )
        results.append(result)
        log(
            f"{options.workers} workers of {shards}: {result.device_fraction:.2f} of a "
            f"worker on a device, {result.losses[-1]:.4f} bits per byte"
        )
    difference = np.abs(results[0].losses - results[1].losses).max()
    log(f"largest difference between the losses of a round: {difference:.1e}")
    return results


if __name__ == "__main__":
    main()
