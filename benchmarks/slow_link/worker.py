"""Process of one worker, which trains with each method on request.

    python -m benchmarks.slow_link.worker MODEL COORDINATOR WORKERS WORKER METHOD…

The process reads requests from stdin and writes lines of JSON to stdout:

1. At the start it writes the seconds of a local step and the number of parameters.
2. For each line "REPEATS", up to an empty line, it writes the shortest of REPEATS times
   of an all-reduce of each size of `tasks.all_reduce_sizes`.
3. For each method it writes that it is ready. For each line "ROUNDS EVAL_EVERY", up to
   an empty line, it trains that many rounds from the initial parameters and writes the
   seconds and the held-out losses after every EVAL_EVERY rounds (0: at the end only).
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter

os.environ.setdefault("NPROC", "8")  # JAX 0.10 and 0.11 starve with fewer threads.

import jax
import numpy as np
import optax
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from benchmarks import models
from benchmarks.baselines.stdio_protocol import redirect_stdout
from benchmarks.slow_link import methods, tasks
from benchmarks.timing import time_call
from localsgd_jax.execution.process_local import on_processes

FEW_STEPS, MANY_STEPS = 4, 20


def build_model(name: str, tiny: bool) -> models.Model:
    """Returns a model with its initial parameters."""
    if name == "mlp":
        return models.mlp(16, 1) if tiny else models.mlp()
    return models.gpt(32, 1, 2, 256, 64) if tiny else models.gpt(vocabulary=256)


def time_local_steps(model, optimizer, mesh, task, worker: int) -> float:
    """Measures the seconds of a local step, without the dispatch of a program.

        c = (t(20) − t(4)) / 16

    t(n) is the time of a dispatch of n local steps.
    """
    algorithm = lsgd.local_sgd(model.loss, optimizer, rule=lsgd.average())
    cluster = on_processes(algorithm, mesh)
    state = cluster.init(model.params)

    def seconds(steps: int) -> float:
        batches = tasks.batches(task, worker, mesh.size, steps)
        batches = jax.tree.map(lambda x: x[:, None], batches)
        return time_call(lambda: cluster.local_steps(state, batches))

    seconds(FEW_STEPS), seconds(MANY_STEPS)  # Compiles.
    sync_global_devices("compiled")  # All processes compute during the timing.
    differences = [seconds(MANY_STEPS) - seconds(FEW_STEPS) for _ in range(7)]
    return statistics.median(differences) / (MANY_STEPS - FEW_STEPS)


def compile_all_reduces(mesh, tiny: bool) -> list[Callable]:
    """Returns a compiled call for each size of `tasks.all_reduce_sizes`."""
    sharding = NamedSharding(mesh, P("worker"))
    all_reduce = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "worker"),
            mesh=mesh,
            in_specs=P("worker"),
            out_specs=P("worker"),
        )
    )
    operands = [
        jax.make_array_from_process_local_data(sharding, np.ones((1, size // 4), "f4"))
        for size in tasks.all_reduce_sizes(tiny)
    ]
    calls = [partial(all_reduce, operand) for operand in operands]
    for call in calls:
        time_call(call)
    return calls


def shortest_seconds(calls: Sequence[Callable], repeats: int) -> list[float]:
    """Returns the shortest time of each call; the calls alternate."""
    times = [[time_call(call) for call in calls] for _ in range(repeats)]
    return [min(seconds) for seconds in zip(*times, strict=True)]


def train(
    runner: methods.MethodRunner, batches, rounds: int, eval_every: int, loss: Callable
) -> dict:
    """Trains from the initial parameters and measures the time of the rounds.

    The time is `rounds` times the mean over all rounds but the first, which waits for
    no synchronisation in flight. Evaluations are not part of it.

    Args:
      runner: functions of the method.
      batches: leaves `(T, B, ...)` of the local worker.
      rounds: R.
      eval_every: rounds between evaluations; 0 for none of the averaged model and one
        of the local worker at the end.
      loss: `loss(params) -> float`, held-out loss.

    Returns:
      `rounds`, `steps`, `seconds`, and losses by step: `losses` of the averaged model,
      `local_losses` of the local worker.
    """
    period = len(jax.tree.leaves(batches)[0]) // rounds
    run = jax.block_until_ready(runner.start())
    times, losses, local_losses = [], {}, {}
    for done in range(1, rounds + 1):
        steps = slice((done - 1) * period, done * period)
        round_batches = jax.tree.map(itemgetter(steps), batches)
        start = time.perf_counter()
        run = jax.block_until_ready(runner.advance(run, round_batches))
        times.append(time.perf_counter() - start)
        if done == rounds or (eval_every and done % eval_every == 0):
            params = runner.finish(run)
            local_losses[done * period] = loss(methods.local_params(params))
            if eval_every:
                losses[done * period] = loss(runner.mean(params))
    return {
        "rounds": rounds,
        "steps": rounds * period,
        "seconds": rounds * statistics.mean(times[1:] or times),
        "losses": losses,
        "local_losses": local_losses,
    }


def serve_method(
    name: str, task, model, mesh, worker: int, answer: Callable[[dict], None]
) -> None:
    """Compiles a method and answers its training requests, up to an empty line."""
    method = methods.METHODS[name]
    runner = methods.make_runner(method, model, optax.adamw(task.learning_rate), mesh)
    loss = jax.jit(model.loss)
    warm_up = tasks.batches(task, worker, mesh.size, 2 * method.period)
    train(runner, warm_up, 2, 1, lambda params: None)
    sync_global_devices(name)
    answer({"ready": name})
    while line := sys.stdin.readline().strip():
        rounds, eval_every = map(int, line.split())
        batches = tasks.batches(task, worker, mesh.size, rounds * method.period)
        answer(
            train(
                runner,
                batches,
                rounds,
                eval_every,
                lambda params: float(loss(params, task.held_out)),
            )
        )


def main() -> None:
    """Runs the worker process."""
    name, coordinator, workers, worker, *method_names = sys.argv[1:]
    # Gloo prints to stdout, which must contain answers only.
    answers = redirect_stdout()

    def answer(message: dict) -> None:
        print(json.dumps(message), file=answers, flush=True)

    workers, worker = int(workers), int(worker)
    tiny = name.endswith("-tiny")
    name = name.removesuffix("-tiny")
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[worker % len(cores)]})
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(coordinator, workers, worker, initialization_timeout=60)
    mesh = jax.make_mesh((workers,), ("worker",))
    task, model = tasks.TASKS[name](), build_model(name, tiny)
    optimizer = optax.adamw(task.learning_rate)
    step_seconds = time_local_steps(model, optimizer, mesh, task, worker)
    all_reduces = compile_all_reduces(mesh, tiny)
    answer({"step_seconds": step_seconds, "parameters": model.size})
    while line := sys.stdin.readline().strip():
        answer({"seconds": shortest_seconds(all_reduces, int(line))})
    for method_name in method_names:
        serve_method(method_name, task, model, mesh, worker, answer)


if __name__ == "__main__":
    main()
