"""The GPT of text.py with each worker over two devices, against whole workers.

    python examples/sharded.py

trains 4 workers of 2 devices each, on 8 CPU devices if there is no accelerator, with
parameters and moments sharded within the worker; then the same with every worker on one
device: 1 minute on two cores. Expected: each device holds, and sends when workers
agree, 0.57 of a worker's parameters, and the losses of both runs differ by less than
1e-4 bits per byte. It needs the extra `examples`.

    localsgd launch -n 2 --devices-per-process 4 -- python examples/sharded.py

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
from localsgd_jax.flax import Parts, from_nnx

# Columns, then rows: between the two no device needs what another one has.
LAYOUT = {
    "qkv": P(None, "model"),
    "out": P("model", None),
    "up": P(None, "model"),
    "down": P("model", None),
}


class Outcome(NamedTuple):
    """What one placement led to.

    Attributes:
      losses: bits per byte, a mean for each round.
      share: the largest part of a worker's parameters that one device holds.
    """

    losses: np.ndarray
    share: float


def place(parts: Parts, mesh: jax.sharding.Mesh) -> Parts:
    """Shards kernels, and the moments that go with them, over the axis "model"."""

    def put(path: tuple, leaf: jax.Array) -> jax.Array:
        names = [getattr(key, "key", None) for key in path]
        spec = next((LAYOUT[name] for name in names if name in LAYOUT), P())
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map_with_path(put, parts)


def run(
    train: np.ndarray,
    *,
    workers: int,
    shards: int,
    steps: int = 96,
    period: int = 8,
    batch: int = 8,
) -> Outcome:
    """Trains once, each worker over so many devices."""
    mesh = lsgd.worker_mesh(workers, within={"model": shards})
    model = Gpt(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make_optimizer("adamw", steps), wrt=nnx.Param)
    algorithm, start = from_nnx(train_step, model, optimizer, lsgd.average())
    cluster = lsgd.on_mesh(algorithm, mesh)
    state = cluster.init(place(start, mesh))
    held = [
        leaf.addressable_shards[0].data.nbytes
        for leaf in jax.tree.leaves(state.workers.params)
    ]
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(start.params))
    _, history = lsgd.train(
        cluster,
        state,
        lsgd.deal(train, workers=workers, batch=batch),
        every=period,
        steps=steps,
        progress=False,
    )
    return Outcome(history["loss"], sum(held) / whole)


def main(arguments: list[str] | None = None) -> list[Outcome]:
    """Trains sharded and whole workers and prints both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a file instead of Python's help texts")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--period", type=int, default=8)
    options = parser.parse_args(arguments)
    if lsgd.initialize(config=vars(options)) == 1:  # Not from `localsgd launch`.
        jax.config.update("jax_num_cpu_devices", 8)
    first = jax.process_index() == 0
    say = functools.partial(print, flush=True) if first else lambda line: None
    train, _ = load(options.data, length=64)
    outcomes = []
    for shards in (options.shards, 1):
        outcome = run(
            train,
            workers=options.workers,
            shards=shards,
            steps=options.steps,
            period=options.period,
        )
        outcomes.append(outcome)
        say(
            f"{options.workers} workers of {shards}: {outcome.share:.2f} of a worker "
            f"on a device, {outcome.losses[-1]:.4f} bits per byte"
        )
    apart = np.abs(outcomes[0].losses - outcomes[1].losses).max()
    say(f"largest difference between the losses of a round: {apart:.1e}")
    return outcomes


if __name__ == "__main__":
    main()
