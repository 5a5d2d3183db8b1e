"""Training with checkpoints on a disk that may be full or read-only.

    python checkpoint_on_full_disk.py DIRECTORY STEPS

Prints a line of JSON: the error, the latest complete checkpoint and the restored one.
"""

import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, RunCheckpointer

SIZE = 100_000


def make_cluster():
    algorithm = lsgd.local_sgd(
        lambda w, x: jnp.mean((w[None] - x[:, None]) ** 2),
        optax.sgd(0.1),
        lsgd.average(),
    )
    return lsgd.simulate(algorithm, 2)


def start():
    return np.random.default_rng(0).normal(size=SIZE).astype(np.float32)


def run(directory, steps):
    cluster = make_cluster()
    with RunCheckpointer(directory, cluster, max_to_keep=100) as checkpointer:
        state, examples_seen = checkpointer.restore(cluster.init(start()))
        batches = lsgd.shuffled_batches(
            np.arange(8, dtype=np.float32), 2, 2, examples_seen=examples_seen
        )
        return lsgd.train(
            cluster,
            state,
            batches,
            schedule=2,
            steps=steps,
            save=checkpointer.save,
            save_every=4,
            progress=False,
        )[1]


def latest_restorable(directory):
    """Returns the step of the checkpoint that is restored."""
    cluster = make_cluster()
    with RunCheckpointer(directory, cluster) as checkpointer:
        return int(checkpointer.restore(cluster.init(start()))[0].step)


def main(directory, steps):
    row = {"error": None}
    try:
        run(directory, int(steps))
    except (CheckpointError, OSError) as error:
        row["error"] = str(error)
    names = [p.name for p in pathlib.Path(directory).glob("*") if p.name.isdigit()]
    row["complete"] = max(map(int, names), default=None)
    if names:
        row["restored"] = latest_restorable(directory)
    print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
