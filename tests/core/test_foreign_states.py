"""States that were donated or belong to another algorithm raise in one line."""

import jax.numpy as jnp
import optax
import pytest

import localsgd_jax as lsgd


def make(optimizer, rule):
    algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optimizer, rule)
    return lsgd.simulate(algorithm, workers=2)


def test_donated_state_raises():
    cluster = make(optax.sgd(0.1), lsgd.average())
    state = cluster.init(jnp.zeros(()))
    batches = [jnp.ones(2)]
    lsgd.train(cluster, state, batches, schedule=1, progress=False)
    message = "state must not be donated, got a deleted leaf .* use the state that"
    for name, call in {
        "train": lambda: lsgd.train(cluster, state, batches, schedule=1),
        "consensus": lambda: lsgd.consensus(state),
        "sync": lambda: cluster.sync(state),
        "step": lambda: cluster.step(state, batches[0]),
    }.items():
        with pytest.raises(ValueError, match=rf"{name}\(state\): {message}"):
            call()


def test_state_of_another_optimizer_or_rule_raises():
    sgd = make(optax.sgd(0.1), lsgd.average()).init(jnp.zeros(()))
    other = make(optax.adam(0.1), lsgd.diloco())
    with pytest.raises(TypeError, match=r"step\(state\): .* of another optimizer"):
        other.step(sgd, jnp.ones(2))
    with pytest.raises(TypeError, match=r"sync\(state\): .* of another optimizer"):
        other.sync(sgd)
