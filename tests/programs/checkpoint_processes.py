"""Checkpoints of several processes: sharded workers, resize, damage and the lock.

    localsgd launch -n 2 --devices-per-process 4 -- \
        python checkpoint_processes.py DIRECTORY

Every process prints lines of JSON with its index.
"""

import json
import pathlib
import sys
import warnings

import jax
import numpy as np
from harness.sharded_run import (
    abstract_params,
    different_workers,
    initial_params,
    make_cluster,
)

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, RunCheckpointer
from localsgd_jax.distributed.arrays import to_host


def emit(case, **values):
    print(
        json.dumps({"process": jax.process_index(), "case": case} | values), flush=True
    )


def save(directory):
    """Saves checkpoints of steps 1 and 2 with four workers of two devices."""
    cluster, mesh = make_cluster(4, 2)
    state = cluster.init(initial_params(mesh))
    with RunCheckpointer(directory, cluster) as checkpointer:
        for step in (1, 2):
            state = different_workers(state)
            checkpointer.save(state, step)
        try:
            RunCheckpointer(directory, cluster)
        except CheckpointError as error:
            emit("locked", error=str(error))
    return state


def restored(directory, workers, fsdp, **options):
    """Restores onto other workers; returns the state on the host."""
    cluster, mesh = make_cluster(workers, fsdp)
    template = cluster.init(abstract_params(mesh))
    with RunCheckpointer(directory, cluster) as checkpointer:
        state, _ = checkpointer.restore(template, **options)
    for leaf, like in zip(
        jax.tree.leaves(state), jax.tree.leaves(template), strict=True
    ):
        assert leaf.sharding == like.sharding
    return to_host(state)


def is_mean(new, old):
    """Returns whether each worker has the mean of the old workers."""
    return all(
        np.allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64).mean(0), rtol=1e-2
        )
        for x, y in zip(
            jax.tree.leaves(new.workers.params),
            jax.tree.leaves(old.workers.params),
            strict=True,
        )
    )


def flip_bit(path):
    """Flips a bit in the middle of the largest file of a directory."""
    largest = max(
        (x for x in path.rglob("*") if x.is_file()), key=lambda x: x.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)


def main(directory):
    lsgd.initialize(timeout=60)
    saved = to_host(save(directory))
    same = restored(directory, 4, 2)
    equal = jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), same, saved)
    emit("same", equal=all(jax.tree.leaves(equal)))
    emit("resized", mean=is_mean(restored(directory, 2, 4), saved))
    if jax.process_index() == 0:
        flip_bit(pathlib.Path(directory, "2"))
    try:
        restored(directory, 2, 4)
    except CheckpointError as error:
        emit("damaged", error=str(error))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        emit("fallback", step=int(restored(directory, 2, 4, fallback=True).step))
    names = sorted(x.name for x in pathlib.Path(directory).iterdir())
    emit("directory", names=names)


if __name__ == "__main__":
    main(*sys.argv[1:])
