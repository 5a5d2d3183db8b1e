"""Checkpoints of another run raise and name the difference."""

import jax.numpy as jnp
import optax
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


def trained_run(optimizer, rule):
    """Returns a cluster and its state after a step."""
    made = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optimizer, rule)
    cluster = lsgd.simulate(made, 2)
    state = cluster.init(jnp.zeros(()))
    state, _ = cluster.step(state, jnp.array([1.0, 3.0]))
    return cluster, state


@pytest.mark.parametrize(
    "entry, first, second",
    [
        (
            "optimizer",
            (optax.sgd(0.1, 0.9), lsgd.average()),
            (optax.sgd(7.0, 0.1), lsgd.average()),
        ),
        (
            "rule",
            (optax.sgd(0.1), lsgd.diloco(0.7)),
            (optax.sgd(0.1), lsgd.diloco(0.1)),
        ),
        (
            "rule",
            (optax.sgd(0.1), lsgd.when(lambda r: r % 2 == 0, lsgd.average())),
            (optax.sgd(0.1), lsgd.when(lambda r: r % 3 == 0, lsgd.average())),
        ),
        (
            "rule",
            (optax.sgd(0.1), lsgd.outer(optax.sgd(0.1, 0.9))),
            (optax.sgd(0.1), lsgd.outer(optax.sgd(7.0, 0.1))),
        ),
    ],
)
def test_numbers_are_compared_unless_they_are_changed_on_purpose(
    tmp_path, entry, first, second
):
    cluster, state = trained_run(*first)
    with RunCheckpointer(tmp_path, cluster) as checkpointer:
        checkpointer.save(state)
    other, initial = trained_run(*second)
    with RunCheckpointer(tmp_path, other) as checkpointer:
        message = rf'{entry}: .* in this run \(to change it: .*changed=\["{entry}"\]'
        with pytest.raises(CheckpointError, match=message):
            checkpointer.restore(initial)
        restored, _ = checkpointer.restore(initial, changed=[entry])
        assert restored.workers.params.tolist() == state.workers.params.tolist()
        with pytest.raises(ValueError, match=r"restore\(changed\): .*'leaves'"):
            checkpointer.restore(initial, changed=["leaves"])
