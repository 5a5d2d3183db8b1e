"""What the processes of a job do in `test_processes.py`, under `localsgd launch`.

    localsgd launch -n 2 -- python one_job.py SCENE ...

Every process prints lines of JSON with its number.
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


def say(**facts):
    print(json.dumps({"process": int(os.environ["LOCALSGD_PROCESS"])} | facts), flush=1)


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
    """Rules and schedules that differ in what processes send and when they wait."""
    weight = np.array([1.0, 2.0, 0.0, 1.0])
    bits = lsgd.quantize(lsgd.average(), 8)
    return {
        "weighted": (lsgd.diloco(), lsgd.every(4), {"weight": weight}),
        "compressed": (bits, lsgd.at([3, 4, 13]), {"chunk": 5}),
        "one-shot": (lsgd.average(), lsgd.never(), {}),
    }


def trained(name):
    """Trains a case; returns numbers that do not depend on the processes."""
    rule, schedule, more = cases()[name]
    cluster, calls = make_cluster(rule), {"evaluate": 0, "record": 0}

    def evaluate(w):
        calls["evaluate"] += 1
        return {"error": loss_fn(w, data())}

    def record(row):
        calls["record"] += 1

    own = lsgd.own_workers(cluster) if name == "compressed" else None
    batches = lsgd.deal(data(), WORKERS, BATCH, only=own)
    state, history = lsgd.train(
        cluster,
        cluster.init(network()),
        batches,
        every=schedule,
        steps=18,
        evaluate=evaluate,
        evaluate_every=2,
        record=record,
        progress=False,
        **more,
    )
    model = lsgd.consensus(state)
    for name in ("seconds", "device_bytes"):  # Differ with the devices.
        history.pop(name, None)
    return calls, {
        "history": {name: column.tolist() for name, column in history.items()},
        "model": {name: np.asarray(leaf).tolist() for name, leaf in model.items()},
    }


def resumed(directory, steps):
    """Goes on from the last checkpoint; returns where it began and the model."""
    import jax
    import jax.numpy as jnp

    from localsgd_jax.checkpoint import Checkpoints

    def step(state, batch):
        key, now = jax.random.split(state["key"])
        loss, grad = jax.value_and_grad(loss_fn)(state["params"], batch)
        noise = 1 + 0.1 * jax.random.normal(now)
        params = jax.tree.map(lambda p, g: p - 0.1 * noise * g, state["params"], grad)
        return {"params": params, "key": key, "seen": state["seen"] + 1}, {"loss": loss}

    algorithm = lsgd.from_train_step(step, rule=lsgd.diloco())
    cluster = lsgd.on_mesh(algorithm, lsgd.worker_mesh(WORKERS), WORKERS)
    start = {"params": network(), "key": jax.random.key(3), "seen": jnp.int32(0)}
    with Checkpoints(directory, cluster) as saved:
        state, dealt = saved.restore(cluster.init(start))
        began = int(state.step)
        state, _ = lsgd.train(
            cluster,
            state,
            lsgd.deal(data(), WORKERS, BATCH, start=dealt),
            every=4,
            steps=steps,
            save=saved.save,
            save_every=8,
            progress=False,
        )
    model = lsgd.consensus(state)
    return began, {name: np.asarray(leaf).tolist() for name, leaf in model.items()}


def scene_train(directory, steps, *names):
    lsgd.initialize(timeout=60)
    say(case="compiled", few=compilations(8), many=compilations(32))
    for name in names:
        calls, numbers = trained(name)
        say(case=name, calls=calls, **numbers)
    if steps != "0":
        began, model = resumed(directory, int(steps))
        say(case="resumed", began=began, model=model)


def compilations(steps):
    """Trains in dispatches of 4 steps; returns how many programs JAX compiled."""
    import jax

    cluster, compiled = make_cluster(), []

    def heard(event, seconds, **about):
        compiled.append(event.endswith("backend_compile_duration"))

    state, batches = cluster.init(network()), lsgd.deal(data(), WORKERS, BATCH)
    jax.monitoring.register_event_duration_secs_listener(heard)
    lsgd.train(cluster, state, batches, every=4, steps=steps, progress=False, chunk=4)
    jax.monitoring.unregister_event_duration_listener(heard)
    return sum(compiled)


def refused(name, call):
    """Says with what error a call ends."""
    try:
        call()
        say(case=name, error=None)
    except Exception as error:
        say(case=name, kind=type(error).__name__, error=str(error))


def scene_differ(directory):
    """Process 1 is another one each time; then it fails for good."""
    odd = os.environ["LOCALSGD_PROCESS"] == "1"
    folder = pathlib.Path(directory)
    differ_before_jax(odd, folder)
    lsgd.initialize(timeout=60)
    foreign_visits()
    differ_at_start(odd)
    differ_in_training(odd, folder)
    differ_in_data(odd, folder)
    one_is_absent(odd, folder)
    if odd:
        raise ValueError("process 1 fails for good")
    time.sleep(600)


def done(folder, name):
    (folder / name).touch()


def wait_for(folder, name):
    while not (folder / name).exists():
        time.sleep(0.02)


def apart(folder, name, odd):
    """Waits until both are here, without JAX."""
    done(folder, f"{name}{int(odd)}")
    wait_for(folder, f"{name}{int(not odd)}")


def differ_before_jax(odd, folder):
    from localsgd_jax import distributed

    version = distributed.version
    distributed.version = lambda name: "9.9" if odd and name == "jax" else version(name)
    refused("version", lambda: lsgd.initialize(timeout=60))
    distributed.version = version
    apart(folder, "versions", odd)
    config = {"period": 8 if odd else 4}
    refused("config", lambda: lsgd.initialize(config=config, timeout=60))
    apart(folder, "configs", odd)
    if odd:
        wait_for(folder, "given up")
    refused("late", lambda: lsgd.initialize(timeout=1))
    done(folder, "given up")
    apart(folder, "late", odd)


def foreign_visits():
    """Another job comes to the port of this one, which does not mind."""
    from localsgd_jax import rollcall

    address = os.environ["LOCALSGD_COORDINATOR"]
    facts = {"job": "another"}
    refused("foreign 0", lambda: rollcall.hold(address, facts, 2, 5))
    refused("foreign 1", lambda: rollcall.attend(address, facts, 1, 5))


def differ_at_start(odd):
    refused("shapes", lambda: make_cluster().init(network(4 if odd else 3)))
    other = {"in": network()["in"] + odd, "out": network()["out"]}
    refused("values", lambda: make_cluster().init(other))
    rule = lsgd.diloco() if odd else lsgd.average()
    refused("rule", lambda: make_cluster(rule).init(network()))


def differ_in_training(odd, folder):
    import jax.numpy as jnp

    def run(every=4, rate=0.02, batch=BATCH, steps=4, count=None, **more):
        cluster = make_cluster(rate=rate)
        batches = itertools.islice(lsgd.deal(data(), WORKERS, batch), count)
        more = {"every": every, "steps": steps, "progress": False} | more
        lsgd.train(cluster, cluster.init(network()), batches, **more)

    def fails(w):
        raise OSError("no space left")

    def only_one(w):
        return jnp.sum(w["out"]) / 0

    run(every=lambda step: step % 4 == 0)  # Has another address in each process.
    refused("schedule", lambda: run(every=8 if odd else 4))
    refused("beats", lambda: run(every=lambda step: step % (2 + odd) == 0))
    refused("rate", lambda: run(rate=0.04 if odd else 0.02))
    refused("batch", lambda: run(batch=2 if odd else 4))
    refused("nothing", lambda: run(count=0 if odd else 8, steps=None))
    refused("evaluate", lambda: run(evaluate=fails))
    refused("diverges", lambda: run(rate=1e38, steps=8))
    refused("alike", lambda: run(evaluate=only_one))


@contextlib.contextmanager
def impatient():
    """Nobody waits for another process for long."""
    from localsgd_jax import agreement

    before, agreement.TIMEOUT = agreement.TIMEOUT, 2
    yield
    agreement.TIMEOUT = before


def fed(batches):
    """Trains on all batches, with dispatches of 8 steps; says what came of it."""
    cluster, saves = make_cluster(), []
    state, history = lsgd.train(
        cluster,
        cluster.init(network()),
        batches,
        every=4,
        save=lambda state, dealt: saves.append([int(state.step), dealt]),
        save_every=3,
        progress=False,
        chunk=8,
    )
    model = {name: x.tolist() for name, x in lsgd.consensus(state).items()}
    columns = {name: history[name].tolist() for name in ("step", "loss")}
    return {"history": columns, "model": model, "saves": saves}


def ending(count):
    """As many batches."""
    return itertools.islice(lsgd.deal(data(), WORKERS, BATCH), count)


def differ_in_data(odd, folder):
    """What happens where processes have read ahead what they compared."""

    def broken():
        yield from ending(21)
        raise OSError("the disk is gone")

    def smaller():
        yield from ending(21)
        yield from lsgd.deal(data(), WORKERS, 2)

    def stuck():
        yield from ending(21)
        wait_for(folder, "given up again")

    for name, count in (("shorter", 21), ("whole", 24), ("first", 5)):
        say(case=name, **fed(ending(count if odd else 29)))
    refused("unreadable", lambda: fed(broken() if odd else ending(29)))
    refused("smaller", lambda: fed(smaller() if odd else ending(29)))
    with impatient():
        refused("stuck", lambda: fed(stuck() if odd else ending(29)))
        done(folder, "given up again")


def one_is_absent(odd, folder):
    """The last of all: from then on the processes count their calls differently."""
    with impatient():
        if odd:
            wait_for(folder, "missed")
        else:
            refused("absent", lambda: make_cluster().init(network()))
            done(folder, "missed")


if __name__ == "__main__":
    globals()[f"scene_{sys.argv[1]}"](*sys.argv[2:])
