"""Process of a job that trains with `fault_tolerance.train`.

    python fault_tolerant_worker.py SETTINGS

SETTINGS is JSON with the arguments of `main`. Prints lines of JSON.
"""

import contextlib
import json
import os
import signal
import sys
import time

os.environ.setdefault("NPROC", "16")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from localsgd_jax import fault_tolerance
from localsgd_jax.checkpoint import RunCheckpointer
from localsgd_jax.execution.process_local import on_processes

WORKERS, BATCH = 12, 4
TRUE_WEIGHTS = np.linspace(-1, 1, 8).astype(np.float32)


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(960, 8)).astype(np.float32)
    return x, (x @ TRUE_WEIGHTS + rng.normal(size=960)).astype(np.float32)


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"] - y) ** 2)


def algorithm():
    return lsgd.local_sgd(loss_fn, optax.adam(0.02), rule=lsgd.average())


def initial_params(value=0.0):
    return {"w": jnp.full(8, value)}


def evaluate(params):
    return {"error": loss_fn(params, data())}


def failing_evaluate(params):
    raise OSError("no table")


def is_first_start():
    return os.environ.get("LOCALSGD_RESTART_COUNT", "0") == "0"


def slow_batches(batches, seconds, kill_after):
    """Sleeps before each batch, and kills the process in its first start."""
    for i, batch in enumerate(batches):
        time.sleep(seconds)
        if i == kill_after and is_first_start():
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


def main(
    steps,
    period=5,
    sync_steps=None,
    initial_values=(),
    evaluate_fails=False,
    evaluate_every=1000,
    batch_seconds=(),
    pause=0.0,
    kill_after=(),
    start_faults=(),
    directory=None,
    save_every=20,
    heartbeat=6,
    sync_timeout=15.0,
    **options,
):
    """Trains, and prints the start, each row and the history.

    Args:
      steps: local steps of each worker.
      period: local steps of a round.
      sync_steps: period of each process, instead of `period`.
      initial_values: value of the initial parameters of each process.
      evaluate_fails: whether `evaluate` raises.
      evaluate_every: rounds; the last one is evaluated in any case.
      batch_seconds: seconds to load a batch, for each process.
      pause: further seconds to load a batch, equal in all processes.
      kill_after: pairs of a process and a number of batches, after which it kills
        itself.
      start_faults: pairs of a process and the name of a signal, which it sends to
        itself in its first start, between `initialize` and the training.
      directory: directory of checkpoints; None for none.
      save_every: local steps between two checkpoints.
      heartbeat: heartbeat timeout in seconds.
      sync_timeout: seconds.
      **options: further arguments of `fault_tolerance.train`.
    """
    jax.config.update("jax_platforms", "cpu")
    lsgd.initialize(heartbeat_timeout_seconds=heartbeat, recoverable=True, timeout=60)
    process = jax.process_index()
    if (name := dict(start_faults).get(process)) and is_first_start():
        os.kill(os.getpid(), getattr(signal, name))
    cluster = on_processes(algorithm(), lsgd.worker_mesh(), WORKERS)
    state = cluster.init(initial_params(*initial_values[process : process + 1]))
    examples_seen, save = 0, None
    with contextlib.ExitStack() as stack:
        if directory:
            checkpointer = stack.enter_context(
                RunCheckpointer(directory, cluster.mean_cluster, process_local=True)
            )
            single = cluster.mean_cluster.init(initial_params())
            single, examples_seen = checkpointer.restore(single)
            state, save = cluster.replicate(single), checkpointer.save
        start = {"from": int(state.step), "process": process, "pid": os.getpid()}
        print(json.dumps(start), flush=True)
        batches = lsgd.shuffled_batches(
            data(), workers=WORKERS, batch=BATCH, examples_seen=examples_seen
        )
        seconds = pause + (batch_seconds[process] if batch_seconds else 0)
        state, history = fault_tolerance.train(
            cluster,
            state,
            slow_batches(batches, seconds, dict(kill_after).get(process)),
            schedule=sync_steps[process] if sync_steps else period,
            steps=steps - int(state.step),
            evaluate=failing_evaluate if evaluate_fails else evaluate,
            evaluate_every=evaluate_every,
            on_round_end=lambda row: print(json.dumps({"row": row}), flush=True),
            save=save,
            save_every=save_every,
            progress=False,
            sync_timeout=sync_timeout,
            **options,
        )
    columns = {name: values.tolist() for name, values in history.items()}
    print(json.dumps({"process": process, "history": columns}), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
