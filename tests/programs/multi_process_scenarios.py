"""Scenarios of `multi_process/test_training.py`, run under `localsgd launch`.

    localsgd launch -n 2 -- python multi_process_scenarios.py SCENARIO ...

Every process prints lines of JSON with its index.
"""

import contextlib
import itertools
import json
import os
import pathlib
import sys
import time

import numpy as np

import localsgd_jax as lsgd

WORKERS, BATCH = 4, 4


def emit(**values):
    process = int(os.environ["LOCALSGD_PROCESS_ID"])
    print(json.dumps({"process": process} | values), flush=True)


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 5)).astype(np.float32)
    return x, np.tanh(x @ np.linspace(-1, 1, 5, dtype=np.float32))


def loss_fn(w, batch):
    import jax.numpy as jnp

    return jnp.mean((jnp.tanh(batch[0] @ w["in"]) @ w["out"] - batch[1]) ** 2)


def network(width=3):
    rng = np.random.default_rng(1)
    return {
        "in": rng.normal(size=(5, width)).astype(np.float32) / 3,
        "out": rng.normal(size=width).astype(np.float32) / 3,
    }


def make_cluster(rule=None, rate=0.02):
    import optax

    algorithm = lsgd.local_sgd(loss_fn, optax.adam(rate), rule=rule or lsgd.average())
    return lsgd.on_mesh(algorithm, lsgd.worker_mesh(WORKERS), WORKERS)


def cases():
    """Returns rules and schedules with different collectives and dispatches."""
    weights = np.array([1.0, 2.0, 0.0, 1.0])
    quantized = lsgd.quantize(lsgd.average(), 8)
    dispatches = {"max_steps_per_dispatch": 5}
    return {
        "weighted": (lsgd.diloco(), lsgd.every(4), {"weights": weights}),
        "compressed": (quantized, lsgd.at_steps([3, 4, 13]), dispatches),
        "one-shot": (lsgd.average(), lsgd.never(), {}),
    }


def trained(name):
    """Trains a case; returns calls, and results that do not depend on the processes."""
    rule, schedule, options = cases()[name]
    cluster, calls = make_cluster(rule), {"evaluate": 0, "record": 0}

    def evaluate(w):
        calls["evaluate"] += 1
        return {"error": loss_fn(w, data())}

    def record(row):
        calls["record"] += 1

    local = lsgd.local_workers(cluster) if name == "compressed" else None
    batches = lsgd.shuffled_batches(data(), WORKERS, BATCH, local_workers=local)
    state, history = lsgd.train(
        cluster,
        cluster.init(network()),
        batches,
        schedule=schedule,
        steps=18,
        evaluate=evaluate,
        evaluate_every=2,
        on_round_end=record,
        progress=False,
        **options,
    )
    model = lsgd.consensus(state)
    for column in ("seconds", "device_bytes"):  # These depend on the devices.
        history.pop(column, None)
    return calls, {
        "history": {name: column.tolist() for name, column in history.items()},
        "model": {name: np.asarray(leaf).tolist() for name, leaf in model.items()},
    }


def resumed(directory, steps):
    """Resumes from the last checkpoint; returns its step and the final model."""
    import jax
    import jax.numpy as jnp

    from localsgd_jax.checkpoint import RunCheckpointer

    def step(state, batch):
        key, noise_key = jax.random.split(state["key"])
        loss, grad = jax.value_and_grad(loss_fn)(state["params"], batch)
        noise = 1 + 0.1 * jax.random.normal(noise_key)
        params = jax.tree.map(lambda p, g: p - 0.1 * noise * g, state["params"], grad)
        return {"params": params, "key": key, "seen": state["seen"] + 1}, {"loss": loss}

    algorithm = lsgd.from_train_step(step, rule=lsgd.diloco())
    cluster = lsgd.on_mesh(algorithm, lsgd.worker_mesh(WORKERS), WORKERS)
    start = {"params": network(), "key": jax.random.key(3), "seen": jnp.int32(0)}
    with RunCheckpointer(directory, cluster) as checkpointer:
        state, examples_seen = checkpointer.restore(cluster.init(start))
        began = int(state.step)
        state, _ = lsgd.train(
            cluster,
            state,
            lsgd.shuffled_batches(data(), WORKERS, BATCH, examples_seen=examples_seen),
            schedule=4,
            steps=steps,
            save=checkpointer.save,
            save_every=8,
            progress=False,
        )
    model = lsgd.consensus(state)
    return began, {name: np.asarray(leaf).tolist() for name, leaf in model.items()}


def scenario_train(directory, steps, *names):
    lsgd.initialize(timeout=60)
    emit(case="compiled", few=compilations(8), many=compilations(32))
    for name in names:
        calls, numbers = trained(name)
        emit(case=name, calls=calls, **numbers)
    if steps != "0":
        began, model = resumed(directory, int(steps))
        emit(case="resumed", began=began, model=model)


def compilations(steps):
    """Trains in dispatches of 4 steps; returns the number of compiled programs."""
    import jax

    cluster, compiled = make_cluster(), []

    def listener(event, seconds, **attributes):
        compiled.append(event.endswith("backend_compile_duration"))

    state = cluster.init(network())
    batches = lsgd.shuffled_batches(data(), WORKERS, BATCH)
    jax.monitoring.register_event_duration_secs_listener(listener)
    lsgd.train(
        cluster,
        state,
        batches,
        schedule=4,
        steps=steps,
        progress=False,
        max_steps_per_dispatch=4,
    )
    jax.monitoring.unregister_event_duration_listener(listener)
    return sum(compiled)


def error_of(name, call):
    """Prints the error with which a call ends, or None."""
    try:
        call()
        emit(case=name, error=None)
    except Exception as error:
        emit(case=name, kind=type(error).__name__, error=str(error))


def is_odd_process():
    return os.environ["LOCALSGD_PROCESS_ID"] == "1"


def scenario_fail(directory):
    """Process 1 has another program, then broken data, then an uncaught error."""
    lsgd.initialize(timeout=60)
    odd = is_odd_process()
    error_of("rate", lambda: run_training(rate=0.04 if odd else 0.02))
    error_of("unreadable", lambda: train_on(broken() if odd else batches(29)))
    fail_in_process_1(odd)


def scenario_differ(directory):
    """Process 1 differs in one respect after the other; then it fails."""
    odd, folder = is_odd_process(), pathlib.Path(directory)
    differ_before_jax(odd, folder)
    lsgd.initialize(timeout=60)
    connect_from_other_job()
    differ_at_start(odd)
    differ_in_training(odd)
    scenario_data_mismatch(odd, folder)
    scenario_missing_process(odd, folder)
    fail_in_process_1(odd)


def fail_in_process_1(odd):
    if odd:
        raise ValueError("process 1 fails")
    time.sleep(600)


def touch(folder, name):
    (folder / name).touch()


def wait_for(folder, name):
    while not (folder / name).exists():
        time.sleep(0.02)


def file_barrier(folder, name, odd):
    """Waits until both processes have called it, without JAX."""
    touch(folder, f"{name}{int(odd)}")
    wait_for(folder, f"{name}{int(not odd)}")


def differ_before_jax(odd, folder):
    from localsgd_jax.distributed import environment

    version = environment.package_version
    environment.package_version = lambda name: (
        "9.9" if odd and name == "jax" else version(name)
    )
    error_of("version", lambda: lsgd.initialize(timeout=60))
    environment.package_version = version
    file_barrier(folder, "versions", odd)
    config = {"period": 8 if odd else 4}
    error_of("config", lambda: lsgd.initialize(config=config, timeout=60))
    file_barrier(folder, "configs", odd)
    if odd:
        wait_for(folder, "timed out")
    error_of("late", lambda: lsgd.initialize(timeout=1))
    touch(folder, "timed out")
    file_barrier(folder, "late", odd)


def connect_from_other_job():
    """Uses the port of this job for a rendezvous of another one."""
    from localsgd_jax.distributed import rendezvous

    address = os.environ["LOCALSGD_COORDINATOR_ADDRESS"]
    fingerprint = {"job_id": "another"}
    error_of("foreign 0", lambda: rendezvous.serve(address, fingerprint, 2, 5, 5))
    error_of("foreign 1", lambda: rendezvous.join(address, fingerprint, 1, 5, 5))


def differ_at_start(odd):
    error_of("shapes", lambda: make_cluster().init(network(4 if odd else 3)))
    other = {"in": network()["in"] + odd, "out": network()["out"]}
    error_of("values", lambda: make_cluster().init(other))
    rule = lsgd.diloco() if odd else lsgd.average()
    error_of("rule", lambda: make_cluster(rule).init(network()))


def run_training(
    schedule=4, rate=0.02, batch_size=BATCH, steps=4, count=None, **options
):
    cluster = make_cluster(rate=rate)
    shuffled = lsgd.shuffled_batches(data(), WORKERS, batch_size)
    lsgd.train(
        cluster,
        cluster.init(network()),
        itertools.islice(shuffled, count),
        schedule=schedule,
        steps=steps,
        progress=False,
        **options,
    )


def differ_in_training(odd):
    import jax.numpy as jnp

    def fails(w):
        raise OSError("no space left")

    def divides_by_zero(w):
        return jnp.sum(w["out"]) / 0

    def rounds_of(h):
        return lambda step: step % h == 0

    # The address of the function differs between processes, its rounds do not.
    run_training(schedule=rounds_of(4))
    error_of("schedule", lambda: run_training(schedule=8 if odd else 4))
    error_of("rounds", lambda: run_training(schedule=rounds_of(2 + odd)))
    error_of("rate", lambda: run_training(rate=0.04 if odd else 0.02))
    error_of("batch", lambda: run_training(batch_size=2 if odd else 4))
    error_of("nothing", lambda: run_training(count=0 if odd else 8, steps=None))
    error_of("evaluate", lambda: run_training(evaluate=fails))
    error_of("diverges", lambda: run_training(rate=1e38, steps=8))
    error_of("alike", lambda: run_training(evaluate=divides_by_zero))


@contextlib.contextmanager
def short_timeouts():
    """Sets the timeout of later checks to 2 s."""
    from localsgd_jax.distributed.coordination import job_state

    previous, job_state.timeout = job_state.timeout, 2
    yield
    job_state.timeout = previous


def train_on(batches):
    """Trains on all batches in dispatches of 8 steps; returns the results."""
    cluster, saves = make_cluster(), []
    state, history = lsgd.train(
        cluster,
        cluster.init(network()),
        batches,
        schedule=4,
        save=lambda state, seen: saves.append([int(state.step), seen]),
        save_every=3,
        progress=False,
        max_steps_per_dispatch=8,
    )
    model = {name: x.tolist() for name, x in lsgd.consensus(state).items()}
    columns = {name: history[name].tolist() for name in ("step", "loss")}
    return {"history": columns, "model": model, "saves": saves}


def batches(count):
    return itertools.islice(lsgd.shuffled_batches(data(), WORKERS, BATCH), count)


def broken():
    """Yields 21 batches, then raises."""
    yield from batches(21)
    raise OSError("the disk is gone")


def scenario_data_mismatch(odd, folder):
    """Processes differ in batches that they prefetched after the check of the start."""

    def smaller():
        yield from batches(21)
        yield from lsgd.shuffled_batches(data(), WORKERS, 2)

    def stuck():
        yield from batches(21)
        wait_for(folder, "timed out again")

    for name, count in (("shorter", 21), ("whole", 24), ("first", 5)):
        emit(case=name, **train_on(batches(count if odd else 29)))
    error_of("unreadable", lambda: train_on(broken() if odd else batches(29)))
    error_of("smaller", lambda: train_on(smaller() if odd else batches(29)))
    with short_timeouts():
        error_of("stuck", lambda: train_on(stuck() if odd else batches(29)))
        touch(folder, "timed out again")


def scenario_missing_process(odd, folder):
    """One process skips a call; later calls would have different sequence numbers."""
    with short_timeouts():
        if odd:
            wait_for(folder, "missed")
        else:
            error_of("absent", lambda: make_cluster().init(network()))
            touch(folder, "missed")


if __name__ == "__main__":
    globals()[f"scenario_{sys.argv[1]}"](*sys.argv[2:])
