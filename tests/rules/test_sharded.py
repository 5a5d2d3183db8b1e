"""Rule state sharded over workers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import mesh
from harness.rule_arrays import (
    K,
    N,
    on_two_devices,
    random_rounds,
    set_params_algorithm,
    sync_arrays,
    sync_tree,
    with_and_without_weights,
)
from harness.selection import in_full

import localsgd_jax as lsgd

SIZE = 2**17


@with_and_without_weights
@pytest.mark.parametrize(
    "rule",
    [
        in_full(lsgd.diloco(), id="diloco"),
        pytest.param(lsgd.outer(optax.adam(0.1)), id="adam"),
        pytest.param(lsgd.average(), id="average"),
    ],
)
def test_sharded_rule_matches_the_rule(rule, weights):
    start = np.arange(N)
    expected, _ = sync_arrays(rule, random_rounds(), weights, start=start)
    sharded = lsgd.shard_state(rule, K)
    for placement in (None, on_two_devices):
        synced, state = sync_arrays(sharded, random_rounds(), weights, start, placement)
        np.testing.assert_allclose(synced, expected, atol=2e-5)
    for leaf in jax.tree.leaves(state.local):
        assert leaf.shape[0] == K and leaf.size <= N + K  # 1/K each, and scalars


def test_sharded_outer_state_sends_as_many_bytes_as_the_mean():
    rule = lsgd.outer(optax.adam(0.1))
    cluster, plain = (
        lsgd.on_mesh(set_params_algorithm(each), mesh(worker=8))
        for each in (lsgd.shard_state(rule, 8), rule)
    )
    state, plain_state = (c.init({"params": jnp.zeros(SIZE)}) for c in (cluster, plain))
    assert cluster.bytes_sent(state) == plain.bytes_sent(plain_state)
    moments = [x for x in jax.tree.leaves(state.local) if x.ndim == 2]
    assert [x.shape for x in moments] == [(8, SIZE // 8)] * 3
    assert all(x.sharding.shard_shape(x.shape)[0] == 1 for x in moments)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: lsgd.shard_state(lsgd.diloco(), 0),
            ValueError,
            r"shard_state\(workers\): the number of workers must be at least 1, got 0",
        ),
        (
            lambda: lsgd.shard_state(lsgd.diloco, 4),
            TypeError,
            r"shard_state\(rule\): a SyncRule",
        ),
        (
            lambda: sync_tree(lsgd.shard_state(lsgd.diloco(), 3)),
            ValueError,
            r"PerWorker leaves of RuleState.local.*must be the 4 workers, got shape "
            r"\(3, 1\)",
        ),
    ],
)
def test_invalid_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
