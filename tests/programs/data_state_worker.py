"""Process of a job that resumes a checkpointable iterator after SIGKILL.

    python data_state_worker.py SETTINGS

SETTINGS is JSON with the arguments of `main`. Prints the step from which it resumes, a
line for each round, and writes the state of its own workers at the end, with the number
of times that each example was used.
"""

import json
import os
import sys
import time

os.environ.setdefault("NPROC", "16")

import jax
import jax.numpy as jnp
import numpy as np
from harness.shards import local_rows

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import RunCheckpointer

WORKERS, BATCH, STEPS = 4, 2, 120
EXAMPLES = WORKERS * BATCH * STEPS


class Records:
    """Data source of Grain, which compares its `repr`: the indices of the examples."""

    def __repr__(self):
        return "Records()"

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        return np.int32(index)


class Shards:
    """Iterator with `state_dict`; it changes the object that it returns."""

    def __init__(self, examples, workers):
        self.examples, self.workers = examples, workers
        self.state = {"position": 0, "seen": []}

    def __iter__(self):
        return self

    def __next__(self):
        start = self.state["position"]
        rows = self.examples[start : start + self.workers * BATCH]
        if not len(rows):
            raise StopIteration
        self.state["position"] += len(rows)
        self.state["seen"].append(int(rows[0]))
        return rows.reshape(self.workers, BATCH)

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def iterator(source, process, processes):
    """Returns one epoch of the shard of a process in batches for its workers."""
    workers = WORKERS // processes
    if source == "state_dict":
        order = np.random.default_rng(0).permutation(EXAMPLES).astype(np.int32)
        return Shards(order[process::processes], workers)
    import grain

    if source == "dataset":
        shard = grain.MapDataset.range(EXAMPLES)[process::processes].shuffle(seed=1)
        batches = shard.map(np.int32).batch(BATCH).batch(workers)
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2)))
    sampler = grain.samplers.IndexSampler(
        EXAMPLES,
        shard_options=grain.sharding.ShardOptions(process, processes),
        shuffle=True,
        num_epochs=1,
        seed=1,
    )
    batches = [grain.transforms.Batch(BATCH), grain.transforms.Batch(workers)]
    return iter(
        grain.DataLoader(data_source=Records(), sampler=sampler, operations=batches)
    )


def train_step(state, ids):
    """Takes a step that depends on the order of examples, and counts them."""
    w = state["params"] * 0.9 + jnp.cos(ids.astype(jnp.float32)).mean()
    counts = state["counts"].at[ids].add(1)
    return {"params": w, "counts": counts}, {"loss": jnp.square(w)}


class Slow:
    """Iterator that waits before each batch and keeps the methods of another one."""

    def __init__(self, batches, pause):
        self.batches, self.pause = batches, pause

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.pause)
        return next(self.batches)

    def __getattr__(self, name):
        return getattr(self.batches, name)


def main(directory, result, source, pause):
    """Trains to the end of the data, from the last checkpoint.

    Args:
      directory: directory of the checkpoints.
      result: prefix of the files of results.
      source: "dataset" or "loader" of Grain, or "state_dict".
      pause: seconds between batches, which spreads signals over steps and writes.
    """
    lsgd.initialize(timeout=60)
    algorithm = lsgd.from_train_step(train_step, lsgd.average())
    cluster = lsgd.on_mesh(algorithm, lsgd.worker_mesh(), workers=WORKERS)
    batches = iterator(source, jax.process_index(), jax.process_count())
    initial = {"params": jnp.float32(0), "counts": jnp.zeros(EXAMPLES, jnp.int32)}
    with RunCheckpointer(directory, cluster, max_to_keep=2) as checkpointer:
        state, _ = checkpointer.restore(cluster.init(initial), batches=batches)
        print(json.dumps({"from": int(state.step), "pid": os.getpid()}), flush=True)
        state, _ = lsgd.train(
            cluster,
            state,
            Slow(batches, pause),
            schedule=4,
            max_steps_per_dispatch=8,
            on_round_end=lambda row: print(json.dumps({"row": row}), flush=True),
            save=checkpointer.save,
            save_every=6,
            progress=False,
        )
    rows = {name: local_rows(leaf) for name, leaf in state.workers.items()}
    np.savez(f"{result}.{jax.process_index()}.npz", step=int(state.step), **rows)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(**json.loads(sys.argv[1]))
