"""Trains with checkpoints until its disk is full; a process of `test_failures.py`.

    python one_disk.py DIRECTORY STEPS

Prints a line of JSON: what ended it, and what can be restored then.
"""

import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, Checkpoints

SIZE = 100_000


def cluster():
    algorithm = lsgd.local_sgd(
        lambda w, x: jnp.mean((w[None] - x[:, None]) ** 2),
        optax.sgd(0.1),
        lsgd.average(),
    )
    return lsgd.simulate(algorithm, 2)


def start():
    return np.random.default_rng(0).normal(size=SIZE).astype(np.float32)


def run(directory, steps):
    place = cluster()
    with Checkpoints(directory, place, keep=100) as saved:
        state, dealt = saved.restore(place.init(start()))
        batches = lsgd.deal(np.arange(8, dtype=np.float32), 2, 2, start=dealt)
        settings = {"save": saved.save, "save_every": 4, "progress": False}
        return lsgd.train(place, state, batches, every=2, steps=steps, **settings)[1]


def restored(directory):
    with Checkpoints(directory, cluster()) as saved:
        return int(saved.restore(cluster().init(start()))[0].step)


def main(directory, steps):
    row = {"error": None}
    try:
        run(directory, int(steps))
    except (CheckpointError, OSError) as error:
        row["error"] = str(error)
    names = [p.name for p in pathlib.Path(directory).glob("*") if p.name.isdigit()]
    row["complete"] = max(map(int, names), default=None)
    if names:
        row["restored"] = restored(directory)
    print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
