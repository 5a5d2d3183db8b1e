"""Checkpoints of another run raise and name the difference."""

import jax.numpy as jnp
import pytest
from harness.cases import momentum_rule
from harness.checkpoint_run import (
    K,
    initial_state,
    make_algorithm,
    save_with_eight_workers,
)

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, RunCheckpointer


def larger_state():
    return initial_state() | {"params": {"w": jnp.zeros(4)}}


def state_with_extra_leaf():
    return initial_state() | {"params": {"w": jnp.zeros(3), "b": jnp.zeros(())}}


@pytest.mark.parametrize(
    "rule, state, options, message",
    [
        (
            None,
            larger_state,
            {},
            r"params'\]\['w'\]: float32\[3\] in the checkpoint, float32\[4\] in",
        ),
        (
            None,
            state_with_extra_leaf,
            {},
            r"workers\['params'\]\['b'\]: nothing in the checkpoint, float32\[\] in",
        ),
        (
            lsgd.average(),
            initial_state,
            {},
            r"rule: .*momentum_rule.* in the checkpoint, .*average\(\)",
        ),
        (
            momentum_rule(rate=0.5),
            initial_state,
            {},
            r"rule: .*rate=0.7.* in the checkpoint, .*rate=0.5.* in this run",
        ),
        (
            {
                "params": momentum_rule(),
                "opt_state": lsgd.floating_only(lsgd.average()),
            },
            initial_state,
            {},
            r"rule: .* in this run",
        ),
        (None, initial_state, {"seed": 1}, r"seed: 0 in the checkpoint, 1 in this run"),
        (
            None,
            initial_state,
            {"config": {"data": "b"}},
            r"config: {} in the checkpoint, {'data': 'b'} in this",
        ),
    ],
)
def test_checkpoint_of_another_run_raises(tmp_path, rule, state, options, message):
    save_with_eight_workers(tmp_path)
    cluster = lsgd.simulate(make_algorithm(rule), K)
    with RunCheckpointer(tmp_path, cluster, **options) as checkpointer:
        with pytest.raises(CheckpointError, match=message):
            checkpointer.restore(cluster.init(state()))


def test_stateless_rules_are_compared_by_name(tmp_path):
    save_with_eight_workers(tmp_path, lsgd.average())
    other = lsgd.simulate(make_algorithm(lsgd.identity()), K)
    with RunCheckpointer(tmp_path, other) as checkpointer:
        with pytest.raises(
            CheckpointError, match=r"average\(\).* in the checkpoint, .*identity\(\)"
        ):
            checkpointer.restore(other.init(initial_state()))
