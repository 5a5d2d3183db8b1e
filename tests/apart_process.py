"""One process of several: rounds of its own, agreement with the others, also beside.

    python apart_process.py COORDINATOR PROCESSES PROCESS

Prints a line of JSON: its workers' parameters after rounds in each manner.
"""

import json
import os
import sys

os.environ.setdefault("NPROC", "8")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localsgd_jax as lsgd
from localsgd_jax.apart import apart, catch_up, in_background

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_enable_preemption_service", False)

WORKERS, PERIOD, ROUNDS = 6, 3, 5
DATA = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
RULES = {  # Made late: optax.sgd wakes the backend, which initialize() must not find.
    "average": lsgd.average,
    "diloco": lsgd.diloco,
    "fields": lambda: {
        "params": lsgd.quantize(lsgd.average(), 8),
        "opt_state": lsgd.floats(lsgd.average()),
    },
}


def loss_fn(params, batch):
    return jnp.mean((batch @ params["w"] - params["b"]) ** 2)


def algorithm(rule):
    return lsgd.local_sgd(loss_fn, optax.adam(0.05), rule=rule)


def keyed():
    """An algorithm whose workers have keys."""
    return lsgd.from_train_step(lambda state, batch: (state, {}), rule=lsgd.average())


def start():
    return {"w": jnp.ones(4), "b": jnp.zeros(())}


def batches():
    """All rounds: leaves (H, K, B, ...)."""
    dealt = lsgd.deal(DATA, workers=WORKERS, batch=2)
    return [np.stack([next(dealt) for _ in range(PERIOD)]) for _ in range(ROUNDS)]


def in_turn(mine, rows):
    """Waits for every agreement."""
    state = mine.init(start())
    for stacked in batches():
        state, _ = mine.round(state, stacked[:, rows])
        state, notes = mine.agree(state, [float(jax.process_index()), 0.5])
        assert notes[:, 0].tolist() == list(range(jax.process_count())), notes
    return state


def beside(mine, rows):
    """Computes a round while the agreement on the one before travels."""
    state, travelling, captured = mine.init(start()), None, None
    for stacked in batches():
        state, _ = mine.round(state, stacked[:, rows])
        if travelling:
            agreed, _ = travelling.result(timeout=60)
            state = catch_up(agreed, state, captured)
        travelling, captured = in_background(mine.agree, state), state
    travelling.result(timeout=60)
    return state


def weighed(mine, rows):
    """Weighs workers by what their process says."""
    state, _ = mine.round(mine.init(start()), batches()[0][:, rows])
    return mine.agree(state, [1.0 + jax.process_index()], weigh=True)[0]


def main(coordinator, processes, process):
    jax.distributed.initialize(
        coordinator, processes, process, initialization_timeout=60
    )
    mesh = jax.make_mesh((processes,), ("worker",))
    each = WORKERS // processes
    rows = slice(process * each, (process + 1) * each)
    keys = {"params": jnp.zeros(()), "key": jax.random.key(3)}
    keys = apart(keyed(), mesh, WORKERS).init(keys).workers["key"]
    found = {"keys": jax.random.key_data(keys).tolist()}
    for name, rule in RULES.items():
        mine = apart(algorithm(rule()), mesh, WORKERS)
        for manner in (in_turn, beside, weighed):
            state = manner(mine, rows)
            params = jax.tree.map(lambda x: np.asarray(x).tolist(), state.workers)
            found[f"{name} {manner.__name__}"] = params.params
        mean = mine.mean(state.workers.params)
        found["own"] = lsgd.own_workers(mine).tolist()
        found[f"{name} mean"] = jax.tree.map(lambda x: np.asarray(x).tolist(), mean)
    print(json.dumps(found), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
