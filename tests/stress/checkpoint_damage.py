"""Random damage to every file of a checkpoint, and outcomes of the restore.

    cd tests && python -m stress.checkpoint_damage --trials 1200 --seed 0

Two workers of two devices each save two checkpoints. Each trial damages one file of the
latest: a flipped bit, a cut, a zeroed block or a deletion. It then restores. Writes the
counts to `docs/_data/checkpoint_damage.json`, prints the table of
`docs/guides/checkpoints.md`, and exits with 1 if a state was wrong in silence or an
error other than CheckpointError was raised.

    refused    CheckpointError that names the damage and the intact checkpoint
    no effect  the restored state is bitwise equal to the one that was saved
    wrong      another state was restored without an error
    raw        any other error
"""

import argparse
import collections
import gc
import importlib.metadata
import json
import logging
import os
import pathlib
import random
import sys
import tempfile
import time
import warnings

os.environ.setdefault("NPROC", "8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness.paths import ROOT
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, RunCheckpointer

KINDS = ("flip", "cut", "zeros", "delete")
RESULTS = ("refused", "no effect", "wrong", "raw")
WORKERS, DEVICES_PER_WORKER = 2, 2
# Orbax leaves unfinished reads of a failed restore to the garbage collector.
TRIALS_PER_COLLECTION = 20
DATA = ROOT / "docs" / "_data" / "checkpoint_damage.json"


def make_cluster():
    """Returns a cluster of sharded workers with shared rule state, and its mesh."""
    algorithm = lsgd.from_train_step(
        lambda state, batch: (state, {"loss": jnp.mean(batch)}),
        lsgd.outer(optax.sgd(0.7, momentum=0.9), lsgd.average()),
    )
    devices = np.array(jax.devices()[: WORKERS * DEVICES_PER_WORKER])
    devices = devices.reshape(WORKERS, DEVICES_PER_WORKER)
    mesh = jax.sharding.Mesh(devices, ("worker", "fsdp"))
    return lsgd.on_mesh(algorithm, mesh), mesh


def initial_state(mesh):
    """Returns leaves of several dtypes; one is sharded, and one is zero."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(64, 48)), jnp.float32)
    params = {
        "w": jax.device_put(w, NamedSharding(mesh, P("fsdp"))),
        "half": jnp.asarray(rng.normal(size=(33, 8)), jnp.bfloat16),
        "zeros": jnp.zeros((64, 64)),
    }
    return {"params": params, "key": jax.random.key(1), "seen": jnp.arange(5)}


def save_two(directory):
    """Saves checkpoints of steps 1 and 2.

    Returns:
      Cluster, initial state, and saved state of step 2.
    """
    cluster, mesh = make_cluster()
    initial, batch = cluster.init(initial_state(mesh)), np.ones((WORKERS, 1), "f4")
    state = initial
    with RunCheckpointer(directory, cluster) as checkpointer:
        for step in (1, 2):
            state, _ = cluster.step(state, batch)
            checkpointer.save(state, step * WORKERS)
    return cluster, initial, state


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


def outcome(checkpointer, initial, saved):
    """Restores; returns the outcome and its message."""
    try:
        state, seen = checkpointer.restore(initial)
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
    cluster, initial, saved = save_two(directory)
    files = sorted(
        x for x in (directory / "2").rglob("*") if x.is_file() and x.stat().st_size
    )
    rng, counts, bad = random.Random(seed), collections.Counter(), []
    with RunCheckpointer(directory, cluster, read_only=True) as checkpointer:
        for trial in range(trials):
            path, kind = files[trial % len(files)], rng.choice(KINDS)
            content, where = path.read_bytes(), file_kind(path)
            changed = damage(content, kind, rng)
            path.unlink() if changed is None else path.write_bytes(changed)
            result, message = outcome(checkpointer, initial, saved)
            path.write_bytes(content)
            counts[where, kind, result] += 1
            if result in ("wrong", "raw"):
                bad.append(f"trial {trial}, {path.name}, {kind}: {result} {message}")
            if trial % TRIALS_PER_COLLECTION == 0:
                gc.collect()
        result, message = outcome(checkpointer, initial, saved)
        if result != "no effect":
            bad.append(f"repaired checkpoint: {result} {message}")
    gc.collect()
    return counts, bad


def to_rows(counts):
    """Returns one row per kind of file and damage, and one of the totals."""
    rows = []
    for where, kind in sorted({key[:2] for key in counts}):
        row = {"file": where, "damage": kind}
        rows.append(row | {name: counts[where, kind, name] for name in RESULTS})
    totals = {name: sum(row[name] for row in rows) for name in RESULTS}
    return [*rows, {"file": "all", "damage": ""} | totals]


def table(rows):
    """Returns a Markdown table of rows."""
    cells = [[*rows[0]], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=DATA)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    warnings.simplefilter("ignore")
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        counts, bad = run_trials(pathlib.Path(directory), options.trials, options.seed)
    rows = to_rows(counts)
    about = {
        name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint")
    }
    about |= {"trials": options.trials, "seed": options.seed}
    about |= {"seconds": round(time.monotonic() - start), "bad": bad}
    options.out.write_text(json.dumps(about | {"counts": rows}, indent=1) + "\n")
    print(table(rows), *bad, sep="\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
