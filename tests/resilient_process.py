"""One process of a job that trains on, whoever dies.

    python resilient_process.py SETTINGS

SETTINGS is JSON; `main` says what it may hold. Prints lines of JSON.
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
from localsgd_jax import resilient
from localsgd_jax.apart import apart
from localsgd_jax.checkpoint import Checkpoints

WORKERS, BATCH = 12, 4
TRUTH = np.linspace(-1, 1, 8).astype(np.float32)


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(960, 8)).astype(np.float32)
    return x, (x @ TRUTH + rng.normal(size=960)).astype(np.float32)


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"] - y) ** 2)


def algorithm():
    return lsgd.local_sgd(loss_fn, optax.adam(0.02), rule=lsgd.average())


def start(value=0.0):
    return {"w": jnp.full(8, value)}


def evaluate(params):
    return {"error": loss_fn(params, data())}


def fails(params):
    raise OSError("no table")


def disturbed(batches, seconds, last):
    """Loads data slowly, and not more than so many batches in its first life."""
    for i, batch in enumerate(batches):
        time.sleep(seconds)
        if i == last and os.environ.get("LOCALSGD_RESTARTS", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


def main(
    steps,
    period=5,
    every=(),
    begin=(),
    broken=False,
    evaluate_every=1000,
    slow=(),
    pause=0.0,
    last=(),
    directory=None,
    save_every=20,
    heartbeat=6,
    timeout=15.0,
    **options,
):
    """Trains.

    Args:
      steps: local steps of each worker.
      period: of them, in a round.
      every: the same, for each process.
      begin: parameters, for each process.
      broken: whether `evaluate` fails.
      evaluate_every: rounds; the last one is evaluated in any case.
      slow: seconds that loading a batch takes, for each process.
      pause: the same for all.
      last: batches after which a process kills itself, by its number.
      directory: for checkpoints.
      save_every: local steps between them.
      heartbeat: seconds.
      timeout: of a meeting.
      **options: of `resilient.train`.
    """
    jax.config.update("jax_platforms", "cpu")
    lsgd.initialize(heartbeat=heartbeat, recoverable=True, timeout=60)
    me = jax.process_index()
    mine = apart(algorithm(), lsgd.worker_mesh(), WORKERS)
    state = mine.init(start(*begin[me : me + 1]))
    dealt, save = 0, None
    with contextlib.ExitStack() as stack:
        if directory:
            saved = stack.enter_context(Checkpoints(directory, mine.one, alone=True))
            one, dealt = saved.restore(mine.one.init(start()))
            state, save = mine.spread(one), saved.save
        facts = {"from": int(state.step), "process": me, "pid": os.getpid()}
        print(json.dumps(facts), flush=True)
        batches = lsgd.deal(data(), workers=WORKERS, batch=BATCH, start=dealt)
        wait = pause + (slow[me] if slow else 0)
        state, history = resilient.train(
            mine,
            state,
            disturbed(batches, wait, dict(last).get(me)),
            every=every[me] if every else period,
            steps=steps - int(state.step),
            evaluate=fails if broken else evaluate,
            evaluate_every=evaluate_every,
            record=lambda row: print(json.dumps({"row": row}), flush=True),
            save=save,
            save_every=save_every,
            progress=False,
            timeout=timeout,
            **options,
        )
    columns = {name: values.tolist() for name, values in history.items()}
    print(json.dumps({"process": me, "history": columns}), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
