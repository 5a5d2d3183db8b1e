"""Assertions that a step contains no collectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import cases
from harness.cases import batches, network
from harness.source_lines import line_of

import localsgd_jax as lsgd


def test_metric_mean_is_reported_with_source():
    cluster = cases.cluster("mesh", "average")

    def step_with_mean(state, batch):
        state, metrics = cluster.step(state, batch)
        return state, jnp.mean(metrics["loss"])

    state, batch = cluster.init(network()), cluster.shard_batch(batches(1)[0])
    with pytest.raises(
        lsgd.UnexpectedCollectiveError, match=r"no collectives along worker, got 1"
    ) as caught:
        lsgd.assert_no_collectives(step_with_mean, state, batch)
    (op,) = caught.value.collectives
    assert op.source[:2] == line_of(step_with_mean, "jnp.mean")
    assert f"test_assertions.py:{op.source.line}" in str(caught.value)
    assert isinstance(caught.value, AssertionError)


def test_per_worker_condition_is_reported_with_source():
    """The condition reads a per-worker counter, which needs a collective."""
    cluster = cases.cluster("mesh", "average")

    def step(state, count, batch):
        state, _ = cluster.step(state, batch)
        due = count[0] % 4 == 0
        return jax.lax.cond(due, cluster.sync, lambda state: state, state), count + 1

    state, batch = cluster.init(network()), cluster.shard_batch(batches(1)[0])
    count = cluster.shard_batch(np.zeros(8, np.int32))
    with pytest.raises(lsgd.UnexpectedCollectiveError) as caught:
        lsgd.assert_no_collectives(step, state, count, batch)
    always = [op for op in caught.value.collectives if not op.in_branch]
    assert {op.source[:2] for op in always} == {line_of(step, "count[0]")}


def test_collectives_on_other_axes_are_allowed():
    cluster = cases.cluster("sharded", "average")
    state, batch = cluster.init(network()), cluster.shard_batch(batches(1)[0])
    lsgd.assert_no_collectives(cluster.step, state, batch)
    with pytest.raises(lsgd.UnexpectedCollectiveError):
        lsgd.assert_no_collectives(cluster.sync, state)
    (op,) = lsgd.assert_no_collectives(cluster.sync, state, axis="model")
    assert op.axes == ("worker",)
    with pytest.raises(lsgd.UnexpectedCollectiveError):
        lsgd.assert_no_collectives(cluster.sync, state, axis=("model", "worker"))


def test_gated_step_raises():
    cluster = cases.cluster("mesh", "average")
    state, batch = cluster.init(network()), cluster.shard_batch(batches(1)[0])
    with pytest.raises(lsgd.UnexpectedCollectiveError, match="branch 2 of 2"):
        lsgd.assert_no_collectives(lsgd.gated(cluster, lsgd.every(4)), state, batch)


@pytest.mark.parametrize(
    "placement, axis, message",
    [
        ("simulate", "worker", "are not on a mesh"),
        ("mesh", "workers", r"has the axes \('worker',\), got 'workers'"),
        ("one_device", "worker", "'worker' has size 1"),
    ],
)
def test_unusable_axis_raises(placement, axis, message):
    cluster = cases.cluster(placement, "average")
    state, batch = cluster.init(network()), cluster.shard_batch(batches(1)[0])
    with pytest.raises(ValueError, match=r"assert_no_collectives\(.*" + message):
        lsgd.assert_no_collectives(cluster.step, state, batch, axis=axis)
