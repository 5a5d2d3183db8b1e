"""Collectives over worker axes in a training step, and steps written for pmap."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from harness.cases import mesh
from harness.source_lines import line_of

import localsgd_jax as lsgd

START = {"params": jnp.ones(3)}
BATCH = np.arange(48, dtype=np.float32).reshape(8, 2, 3) / 48


def plain_step(state, batch):
    grad = jax.grad(lambda w: jnp.mean((batch @ w) ** 2))(state["params"])
    return {"params": state["params"] - 0.1 * grad}, {}


def step_for_pmap(state, batch):
    grad = jax.grad(lambda w: jnp.mean((batch @ w) ** 2))(state["params"])
    grad = jax.lax.pmean(grad, "batch")
    return {"params": state["params"] - 0.1 * grad}, {}


def step_with_scan(state, batch):
    def add(total, row):
        return total + jax.lax.psum(row, "batch"), None

    total, _ = jax.lax.scan(add, jnp.zeros(3), batch)
    return {"params": state["params"] - total}, {}


def step_with_branch(state, batch):
    total = jax.lax.cond(
        batch.sum() > 0, lambda x: jax.lax.all_gather(x, "batch")[0], lambda x: x, batch
    )
    return {"params": state["params"] - total[0]}, {}


def on_batch_axis(train_step, workers=None):
    algorithm = lsgd.from_train_step(train_step, lsgd.average())
    return lsgd.on_mesh(algorithm, mesh(batch=4), workers, axis="batch")


@pytest.mark.parametrize(
    "train_step, primitive, token",
    [
        (step_for_pmap, "psum", "pmean"),
        (step_with_scan, "psum", "psum"),
        (step_with_branch, "all_gather", "all_gather"),
    ],
)
@pytest.mark.parametrize("workers", [4, 8])
def test_a_collective_in_the_step_raises_with_its_line(
    train_step, primitive, token, workers
):
    cluster = on_batch_axis(train_step, workers)
    path, line = line_of(train_step, token)[:2]
    with pytest.raises(ValueError) as error:
        cluster.step(cluster.init(START), BATCH[:workers])
    assert f"collective '{primitive}' over the worker axis 'batch'" in str(error.value)
    assert f"{path}:{line};" in str(error.value)


def test_train_raises_for_a_collective_in_the_step():
    cluster = on_batch_axis(step_for_pmap)
    with pytest.raises(ValueError, match="must not communicate between workers"):
        lsgd.train(cluster, cluster.init(START), [BATCH[:4]], schedule=1)


def test_the_position_of_a_worker_is_no_communication():
    def train_step(state, batch):
        shift = jax.lax.axis_index("batch").astype(jnp.float32)
        return {"params": state["params"] + shift}, {}

    cluster = on_batch_axis(train_step)
    state, _ = cluster.step(cluster.init(START), BATCH[:4])
    np.testing.assert_array_equal(state.workers["params"][:, 0], [1, 2, 3, 4])


@pytest.mark.parametrize(
    "train_step",
    [step_for_pmap, jax.jit(step_for_pmap), jax.pmap(step_for_pmap, axis_name="batch")],
    ids=["plain", "jit", "pmap"],
)
@pytest.mark.parametrize("workers", [4, 8])
def test_a_step_for_pmap_runs_as_the_step_of_one_worker(train_step, workers):
    bound = on_batch_axis(lsgd.bind_axis(train_step, "batch"), workers)
    plain = on_batch_axis(plain_step, workers)
    batch = BATCH[:workers]
    state, _ = bound.step(bound.init(START), batch)
    expected, _ = plain.step(plain.init(START), batch)
    np.testing.assert_allclose(
        state.workers["params"], expected.workers["params"], rtol=1e-6
    )
    lsgd.assert_no_collectives(bound.step, state, batch, axis="batch")


def test_batch_norm_over_a_bound_axis_uses_the_batch_of_the_worker():
    model = nn.BatchNorm(use_running_average=False, axis_name="batch")

    def train_step(state, batch):
        _, updates = model.apply(state, batch, mutable="batch_stats")
        return {**state, **updates}, {}

    variables = dict(model.init(jax.random.key(0), BATCH[0]))
    algorithm = lsgd.from_train_step(
        lsgd.bind_axis(train_step, "batch"), lsgd.average()
    )
    cluster = lsgd.simulate(algorithm, 2)
    state, _ = cluster.step(cluster.init(variables), BATCH[:2])
    mean = state.workers["batch_stats"]["mean"]
    np.testing.assert_allclose(mean, 0.01 * BATCH[:2].mean(1), rtol=1e-4)


@pytest.mark.parametrize(
    "call, argument",
    [
        (partial(lsgd.bind_axis, 3, "batch"), r"bind_axis\(train_step\)"),
        (partial(lsgd.bind_axis, plain_step, 3), r"bind_axis\(axis_name\)"),
    ],
)
def test_bad_arguments_of_bind_axis_raise(call, argument):
    with pytest.raises(TypeError, match=argument):
        call()
