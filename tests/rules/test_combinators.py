"""Rule combinators: chain and conditional application."""

import numpy as np
import pytest
from harness.cases import (
    RULES,
    WORKERS,
    algorithm,
    assert_close,
    assert_same,
    batches,
    cluster,
    run_manually,
)

import localsgd_jax as lsgd


def test_when_applies_the_rule_in_its_rounds_only():
    rule = lsgd.when(lsgd.every(2), lsgd.average())
    cluster = lsgd.simulate(algorithm(rule), WORKERS)
    state, _ = run_manually(cluster, batches(1), lsgd.never())
    once = cluster.sync(state)
    assert_same(once.workers, state.workers)
    twice = cluster.sync(once).workers.params["out"]
    np.testing.assert_array_equal(twice, np.broadcast_to(twice[0], twice.shape))
    assert not np.array_equal(twice, once.workers.params["out"])


@pytest.mark.parametrize("name", ["momentum_rule", "average", "when"])
def test_chain_of_one_is_identity(name):
    link, _ = run_manually(cluster("simulate", name), batches(6), lsgd.every(2))
    chain = lsgd.simulate(algorithm(lsgd.chain(RULES[name].rule)), WORKERS)
    state, _ = run_manually(chain, batches(6), lsgd.every(2))
    assert_close(state.workers, link.workers)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lsgd.chain, ValueError, r"chain\(\*rules\): at least one rule is required"),
        (
            lambda: lsgd.chain(lsgd.average),
            TypeError,
            r"chain\(\*rules\): a SyncRule",
        ),
        (
            lambda: lsgd.when(4, lsgd.average()),
            TypeError,
            r"when\(schedule\): schedule must be callable, got 4",
        ),
        (
            lambda: lsgd.when(lsgd.every(4), lsgd.average),
            TypeError,
            r"when\(rule\): a SyncRule",
        ),
    ],
)
def test_invalid_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
