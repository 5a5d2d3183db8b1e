"""A run that saves every five steps and resumes after SIGKILL.

Arguments: directory of the checkpoints, file of the result, seconds between batches.
It needs four devices. Slow batches spread the kills over local steps, writes and the
end of the run.
"""

import sys
import time

import jax
import numpy as np
from harness.cases import key_data, mesh
from harness.checkpoint_run import batches_from, initial_state, make_algorithm

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import RunCheckpointer

STEPS = 600


def main(directory, result, pause):
    cluster = lsgd.on_mesh(make_algorithm(), mesh(worker=4), workers=8)
    with RunCheckpointer(directory, cluster, max_to_keep=2) as checkpointer:
        state, examples_seen = checkpointer.restore(cluster.init(initial_state()))
        print("resumed at step", int(state.step), flush=True)

        def batches():
            for batch in batches_from(cluster, examples_seen):
                time.sleep(float(pause))
                yield batch

        state, _ = lsgd.train(
            cluster,
            state,
            batches(),
            schedule=4,
            steps=STEPS - int(state.step),
            max_steps_per_dispatch=8,
            save=checkpointer.save,
            save_every=5,
            progress=False,
        )
    np.savez(result, *[key_data(leaf) for leaf in jax.tree.leaves(state)])


if __name__ == "__main__":
    main(*sys.argv[1:])
