"""One process of the measurement, one worker: trains with each method when told to.

    python -m benchmarks.slow_link.worker MODEL COORDINATOR WORKERS WORKER METHOD…

It prints the seconds of a local step alone, and the number of parameters. For each line
that it reads, up to an empty one, it prints the seconds of `tasks.sizes` all-reduced.
Then, for each method, it reads lines "ROUNDS SCORE", up to an empty one: it trains that
many rounds from the start, and prints the seconds that they took, and the held-out loss
after each SCORE rounds (0: after none).
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from operator import itemgetter

os.environ.setdefault("NPROC", "8")

import jax
import numpy as np
import optax
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from benchmarks import models
from benchmarks.slow_link import methods, tasks
from benchmarks.timing import once
from localsgd_jax.apart import apart


def build(name: str, tiny: bool) -> models.Model:
    if name == "mlp":
        return models.mlp(16, 1) if tiny else models.mlp()
    return models.gpt(32, 1, 2, 256, 64) if tiny else models.gpt(vocabulary=256)


def step_alone(model, optimizer, mesh, task, worker: int) -> float:
    """Times local steps without any agreement, and without what a dispatch takes.

    c = (t(20) − t(4)) / 16
    """
    mine = apart(lsgd.local_sgd(model.loss, optimizer, rule=lsgd.average()), mesh)
    state, (few, many) = mine.init(model.params), (4, 20)

    def seconds(steps: int) -> float:
        drawn = tasks.batches(task, worker, mesh.size, steps)
        drawn = jax.tree.map(lambda x: x[:, None], drawn)
        return once(lambda: mine.round(state, drawn))

    seconds(few), seconds(many)
    sync_global_devices("compiled")  # The others compute at the same time.
    times = [seconds(many) - seconds(few) for _ in range(7)]
    return statistics.median(times) / (many - few)


def all_reduces(mesh, tiny: bool) -> list[Callable]:
    """Makes a call for each of `tasks.sizes`, compiled."""
    split = NamedSharding(mesh, P("worker"))
    total = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "worker"),
            mesh=mesh,
            in_specs=P("worker"),
            out_specs=P("worker"),
        )
    )
    rows = [
        jax.make_array_from_process_local_data(split, np.ones((1, size // 4), "f4"))
        for size in tasks.sizes(tiny)
    ]
    calls = [partial(total, row) for row in rows]
    for call in calls:
        once(call)
    return calls


def train(taken: methods.Rounds, batches, rounds: int, score_every: int, score) -> dict:
    """Trains, and says how long it took; scoring does not count.

    The averaged model is scored every so often, the worker's own also at the end. The
    seconds are those of as many rounds as the second and later ones are in the mean:
    the first one waits for no agreement that travels.
    """
    period = len(jax.tree.leaves(batches)[0]) // rounds
    run, times, losses, own = jax.block_until_ready(taken.start()), [], {}, {}
    for done in range(1, rounds + 1):
        turn = itemgetter(slice((done - 1) * period, done * period))
        part = jax.tree.map(turn, batches)
        began = time.perf_counter()
        run = jax.block_until_ready(taken.advance(run, part))
        times.append(time.perf_counter() - began)
        if done == rounds or (score_every and done % score_every == 0):
            rows = taken.settle(run)
            own[done * period] = score(methods.own(rows))
            if score_every:
                losses[done * period] = score(taken.mean(rows))
    seconds = rounds * statistics.mean(times[1:] or times)
    found = {"rounds": rounds, "steps": rounds * period, "seconds": seconds}
    return found | {"losses": losses, "own": own}


def main() -> None:
    name, coordinator, workers, worker, *wanted = sys.argv[1:]
    workers, worker = int(workers), int(worker)
    tiny = name.endswith("-tiny")
    name = name.removesuffix("-tiny")
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[worker % len(cores)]})
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(coordinator, workers, worker, initialization_timeout=60)
    mesh = jax.make_mesh((workers,), ("worker",))
    task, model = tasks.TASKS[name](), build(name, tiny)
    loss = jax.jit(model.loss)
    step = step_alone(model, optax.adamw(task.rate), mesh, task, worker)
    reduce = all_reduces(mesh, tiny)
    print(json.dumps({"step": step, "parameters": model.size}), flush=True)
    while sys.stdin.readline().strip():
        print(json.dumps({"seconds": [once(call) for call in reduce]}), flush=True)
    for method in wanted:
        chosen = methods.METHODS[method]
        taken = methods.rounds(chosen, model, optax.adamw(task.rate), mesh)
        first = tasks.batches(task, worker, workers, 2 * chosen.period)
        train(taken, first, 2, 1, lambda params: None)  # Compiles.
        sync_global_devices(method)
        print(json.dumps({"ready": method}), flush=True)
        while line := sys.stdin.readline().strip():
            rounds, every = map(int, line.split())
            batches = tasks.batches(task, worker, workers, rounds * chosen.period)
            found = train(
                taken,
                batches,
                rounds,
                every,
                lambda params: float(loss(params, task.held_out)),
            )
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
