"""Random damage to every file of a checkpoint, and outcomes of the restore.

    cd tests && python -m stress.checkpoint_damage --trials 1000 --seed 0

Each trial damages one file of the latest of two checkpoints: a flipped bit, a cut, a
zeroed block or a deletion. It then restores. Prints a table of the outcomes and exits
with 1 if a state was wrong in silence or another error than CheckpointError was raised.

    refused    CheckpointError that names the damage and the intact checkpoint
    no effect  the restored state is bitwise equal to the one that was saved
    wrong      another state was restored without an error
    raw        any other error
"""

import argparse
import collections
import gc
import os
import pathlib
import random
import sys
import tempfile
import warnings

os.environ.setdefault("NPROC", "8")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, RunCheckpointer

KINDS = ("flip", "cut", "zeros", "delete")
WORKERS = 4


def make_cluster():
    """Returns a cluster on four devices, with local and shared rule state."""
    algorithm = lsgd.from_train_step(
        lambda state, batch: (state, {"loss": jnp.mean(batch)}),
        lsgd.outer(optax.sgd(0.7, momentum=0.9), lsgd.average()),
    )
    mesh = jax.make_mesh((WORKERS,), ("worker",), devices=jax.devices()[:WORKERS])
    return lsgd.on_mesh(algorithm, mesh)


def initial_state():
    """Returns leaves of several dtypes, with one that compresses and one of zeros."""
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(64, 48)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(33, 8)), jnp.bfloat16),
        "zeros": jnp.zeros((64, 64)),
    }
    return {"params": params, "key": jax.random.key(1), "seen": jnp.arange(5)}


def save_two(directory):
    """Saves checkpoints of steps 1 and 2; returns the cluster and the last state."""
    cluster = make_cluster()
    state, batch = cluster.init(initial_state()), np.ones((WORKERS, 1), np.float32)
    with RunCheckpointer(directory, cluster) as checkpointer:
        for step in (1, 2):
            state, _ = cluster.step(state, batch)
            checkpointer.save(state, step * WORKERS)
    return cluster, state


def damage(content, kind, rng):
    """Returns the damaged content of a file; None for a deletion."""
    if kind == "delete":
        return None
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    changed = bytearray(content)
    if kind == "flip":
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    else:
        start, size = rng.randrange(len(changed)), rng.choice((1, 16, 512, 4096))
        changed[start : start + size] = bytes(len(changed[start : start + size]))
    return bytes(changed)


def outcome(directory, cluster, saved):
    """Restores; returns the outcome and its message."""
    try:
        with RunCheckpointer(directory, cluster) as checkpointer:
            state, seen = checkpointer.restore(cluster.init(initial_state()))
    except CheckpointError as error:
        text = str(error)
        named = "checkpoint 2 in" in text and "is damaged (" in text
        offered = "checkpoint 1 before it is intact" in text
        return ("refused" if named and offered else "raw"), text
    except Exception as error:
        return "raw", f"{type(error).__name__}: {error}"
    equal = seen == 2 * WORKERS and all(map(same_bits, leaves(state), leaves(saved)))
    return ("no effect" if equal else "wrong"), ""


def leaves(state):
    """Returns the leaves with key data in place of typed keys."""
    keys = jax.dtypes.prng_key
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, keys) else x)
        for x in jax.tree.leaves(state)
    ]


def same_bits(left, right):
    return left.dtype == right.dtype and left.tobytes() == right.tobytes()


def file_kind(path):
    """Returns the category of a file of a checkpoint."""
    if path.parent.name == "metadata" and path.name == "metadata":
        return "metadata"
    if path.parent.name == "d" and path.stat().st_size > 4096:
        return "array data"
    if path.parent.name == "d" or path.name == "manifest.ocdbt":
        return "index of the arrays"
    return "other files of Orbax"


def run_trials(directory, trials, seed):
    """Damages files in turn, one per trial, and repairs them.

    Returns:
      Counts by kind of file, kind of damage and outcome; messages of bad outcomes.
    """
    cluster, saved = save_two(directory)
    files = sorted(
        x for x in (directory / "2").rglob("*") if x.is_file() and x.stat().st_size
    )
    rng, counts, bad = random.Random(seed), collections.Counter(), []
    for trial in range(trials):
        path, kind = files[trial % len(files)], rng.choice(KINDS)
        content, where = path.read_bytes(), file_kind(path)
        changed = damage(content, kind, rng)
        path.unlink() if changed is None else path.write_bytes(changed)
        result, message = outcome(directory, cluster, saved)
        path.write_bytes(content)
        counts[where, kind, result] += 1
        if result in ("wrong", "raw"):
            bad.append(f"trial {trial}, {path.name}, {kind}: {result} {message}")
        gc.collect()
    return counts, bad


def table(counts):
    """Returns a Markdown table of the outcomes."""
    results = ("refused", "no effect", "wrong", "raw")
    rows = [" | ".join(("file", "damage", *results)), " | ".join(["---"] * 6)]
    for where, kind in sorted({key[:2] for key in counts}):
        cells = [counts[where, kind, result] for result in results]
        rows.append(" | ".join((where, kind, *map(str, cells))))
    totals = [sum(n for key, n in counts.items() if key[2] == x) for x in results]
    rows.append(" | ".join(("all", "", *map(str, totals))))
    return "\n".join(f"| {row} |" for row in rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as directory:
        counts, bad = run_trials(pathlib.Path(directory), options.trials, options.seed)
    print(table(counts), *bad, sep="\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
