"""Training step of an existing loop on K workers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.selection import in_full

import localsgd_jax as lsgd

BATCHES = np.random.default_rng(0).normal(size=(5, 8, 3)).astype(np.float32)


def train_step(state, batch):
    grad = jax.grad(lambda w: jnp.mean((batch @ w - 1) ** 2))(state["params"])
    return {"params": state["params"] - 0.1 * grad}


def expected(num_steps=5, period=2, workers=4):
    rows = np.zeros((workers, 3), np.float32)
    for t, batch in enumerate(BATCHES[:num_steps], 1):
        parts = batch.reshape(workers, -1, 3)
        rows = np.stack(
            [
                train_step({"params": w}, x)["params"]
                for w, x in zip(rows, parts, strict=True)
            ]
        )
        if t % period == 0:
            rows = np.broadcast_to(rows.mean(0), rows.shape)
    return rows.mean(0)


@pytest.mark.parametrize("schedule", [2, in_full(lsgd.every(2))])
def test_a_loop_with_batches_of_all_workers(schedule):
    start = {"params": jnp.zeros(3)}
    state, step = lsgd.parallelize(train_step, start, workers=4, schedule=schedule)
    for batch in BATCHES:
        state, metrics = step(state, batch)
    assert int(state.round) == 2 and metrics == {}
    np.testing.assert_allclose(lsgd.consensus(state), expected(), rtol=1e-5)


def test_keys_and_numbers_are_further_arguments():
    def random_step(state, batch, key, size):
        return state["params"].sum(), {"params": jax.random.normal(key, (3,)) * size}

    start = {"params": jnp.zeros(3)}
    state, step = lsgd.parallelize(random_step, start, workers=2, schedule=lsgd.never())
    state, loss = step(state, BATCHES[0], jax.random.key(0), 2.0)
    rows = np.asarray(state.workers["params"])
    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_allclose(rows[1], 2 * jax.random.normal(keys[1], (3,)), rtol=1e-6)
    assert loss.shape == (2,) and np.abs(rows[0] - rows[1]).max() > 0.1


def test_several_values_and_algorithms():
    def step_of_two(params, count, batch):
        return count + 1, params - batch.mean(0), batch.sum()

    values = jnp.zeros(3), jnp.int32(0)
    state, step = lsgd.parallelize(step_of_two, *values, workers=2, schedule=1)
    state, metrics = step(state, BATCHES[0])
    params, count = lsgd.consensus(state, None)
    np.testing.assert_allclose(params, -BATCHES[0].mean(0), rtol=1e-5, atol=1e-6)
    assert int(count) == 1 and metrics.shape == (2,)
    algorithm, start = lsgd.from_arguments(step_of_two, *values)
    again, step = lsgd.parallelize(algorithm, start, workers=2, schedule=1)
    again, _ = step(again, BATCHES[0])
    np.testing.assert_array_equal(lsgd.consensus(again, "params"), params)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((train_step,), {}, "at least one initial value"),
        ((3, {"params": jnp.zeros(3)}), {}, "train_step must be"),
        ((train_step, {"params": jnp.zeros(3)}), {"schedule": 0}, "schedule"),
    ],
)
def test_wrong_arguments_raise(arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lsgd.parallelize(*arguments, **{"workers": 2, "schedule": 1} | options)


def test_wrong_states_and_batches_raise():
    start = {"params": jnp.zeros(3)}
    state, step = lsgd.parallelize(train_step, start, workers=2, schedule=1)
    cluster = lsgd.simulate(lsgd.from_train_step(train_step), workers=4)
    with pytest.raises(ValueError, match=r"step\(state\): .* must be the 2 workers"):
        step(cluster.init(start), BATCHES[0])
    with pytest.raises(ValueError, match=r"step\(\*batch\): at least one argument"):
        step(state)
    step(state, BATCHES[0])
    with pytest.raises(ValueError, match=r"step\(state\): state must not be donated"):
        step(state, BATCHES[1])
