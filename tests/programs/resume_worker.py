"""Process of a job that trains with `lsgd.train`, saves and resumes after SIGKILL.

    python resume_worker.py SETTINGS

SETTINGS is JSON with the arguments of `main`. Prints the step from which it resumes,
and writes the rows of its own workers at the end.
"""

import json
import os
import sys
import time

os.environ.setdefault("NPROC", "16")

import jax
import numpy as np
from harness.shards import local_rows

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import RunCheckpointer

WORKERS = 8


def main(directory, result, steps, pause):
    """Trains to the end, from the last checkpoint.

    Args:
      directory: directory of the checkpoints.
      result: prefix of the files of results.
      steps: local steps of each worker.
      pause: seconds between batches, which spreads signals over steps and writes.
    """
    lsgd.initialize(timeout=60)
    # The import makes arrays, which must follow `initialize`.
    from harness.checkpoint_run import batches_from, initial_state, make_algorithm

    cluster = lsgd.on_mesh(make_algorithm(), lsgd.worker_mesh(), workers=WORKERS)
    with RunCheckpointer(directory, cluster, max_to_keep=2) as checkpointer:
        state, examples_seen = checkpointer.restore(cluster.init(initial_state()))
        start = {"from": int(state.step), "pid": os.getpid()}
        print(json.dumps(start), flush=True)

        def batches():
            for batch in batches_from(cluster, examples_seen):
                time.sleep(pause)
                yield batch

        state, _ = lsgd.train(
            cluster,
            state,
            batches(),
            schedule=4,
            steps=steps - int(state.step),
            max_steps_per_dispatch=8,
            on_round_end=lambda row: print(json.dumps({"row": row}), flush=True),
            save=checkpointer.save,
            save_every=5,
            progress=False,
        )
    leaves = [local_rows(leaf) for leaf in jax.tree.leaves(state)]
    np.savez(f"{result}.{jax.process_index()}.npz", *leaves)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(**json.loads(sys.argv[1]))
