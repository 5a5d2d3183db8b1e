"""A resumable run with PRNG keys, counters and Adam moments in its train state."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness.cases import momentum_rule

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import RunCheckpointer

K, BATCH, STEPS = 8, 2, 23
DATA = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
ADAM = optax.adam(0.05)


def train_step(state, batch):
    """Takes a step of Adam on a quadratic loss with noise from the worker's key."""
    noise = jax.random.normal(jax.random.fold_in(state["key"], state["seen"]), (3,))

    def loss_fn(w):
        return jnp.mean((w + 0.1 * noise - batch.mean(0)) ** 2)

    loss, grad = jax.value_and_grad(loss_fn)(state["params"]["w"])
    updates, opt_state = ADAM.update({"w": grad}, state["opt_state"])
    return {
        "params": optax.apply_updates(state["params"], updates),
        "opt_state": opt_state,
        "key": state["key"],
        "seen": state["seen"] + 1,
    }, {"loss": loss}


def initial_state():
    """Returns the initial train state of a worker."""
    params = {"w": jnp.zeros(3)}
    return {
        "params": params,
        "opt_state": ADAM.init(params),
        "key": jax.random.key(5),
        "seen": jnp.int32(0),
    }


def make_algorithm(rule=None):
    """Returns the algorithm with a rule that has local and shared state."""
    return lsgd.from_train_step(train_step, rule or momentum_rule())


def batches_from(cluster, examples_seen):
    """Returns the batches after a number of examples."""
    return lsgd.shuffled_batches(
        DATA, cluster.num_workers, BATCH, examples_seen=examples_seen
    )


def save_with_eight_workers(directory, rule=None):
    """Saves and returns a state of eight different workers after five steps."""
    cluster = lsgd.simulate(make_algorithm(rule), K)
    with RunCheckpointer(directory, cluster) as checkpointer:
        state, _ = checkpointer.restore(cluster.init(initial_state()))
        for step, batch in enumerate(itertools.islice(batches_from(cluster, 0), 5), 1):
            state, _ = cluster.step(state, batch)
            state = cluster.sync(state) if step == 3 else state
        checkpointer.save(state, 5 * K * BATCH)
    return state
