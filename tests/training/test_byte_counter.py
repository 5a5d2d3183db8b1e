"""Bytes of the rounds and evaluations of a run."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import WORKERS, algorithm, batches, mesh, network
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.analysis import total_bytes_sent
from localsgd_jax.analysis.device_bytes import ByteRange, DeviceBytes
from localsgd_jax.execution.mean_model import mean_over_workers
from localsgd_jax.training.byte_counter import ByteCounter
from localsgd_jax.training.evaluation import all_reduce_bytes

STREAMING = lsgd.fragment(lsgd.delay(lsgd.average()), 2, rounds_per_fragment=2)


def cluster_of(rule, positions=4):
    return lsgd.on_mesh(algorithm(rule), mesh(worker=positions), WORKERS)


def train(rule, num_batches=12, positions=4, **options):
    cluster = cluster_of(rule, positions)
    options = {"schedule": 2, "progress": False} | options
    return lsgd.train(cluster, cluster.init(network()), batches(num_batches), **options)


@pytest.mark.parametrize(
    "rule, calls",
    [
        (lsgd.diloco(), 1),
        (STREAMING, 1 + 3 + 4),  # The period grows from 1 over 2 to 4.
        (lsgd.when(lsgd.every(3), lsgd.average()), 1 + 1 + 3),
        # Only the number of the round decides, so that each round is counted.
        (lsgd.when(lsgd.at_steps([2, 30]), lsgd.average()), 1 + 1 + 40),
        in_full(lsgd.when(lsgd.post_local(9, 2), lsgd.average()), None),
    ],
    ids=["diloco", "streaming", "when", "at_steps", "post_local"],
)
def test_bytes_are_counted_once_for_each_position(rule, calls):
    cluster, counted = cluster_of(rule), []
    state = cluster.init(network())

    def bytes_sent(state, round=None):
        counted.append(round)
        return cluster.bytes_sent(state, round)

    counter = ByteCounter(bytes_sent, state)
    sums = [counter.add_round(number)["bytes"] for number in range(1, 41)]
    exact = [cluster.bytes_sent(state, number)[1] for number in range(1, 41)]
    assert sums == np.cumsum(exact).tolist()
    assert calls is None or len(counted) <= calls


def test_uncountable_rule_trains_with_one_warning():
    """The number of exchanges depends on the values."""

    def apply(tree, state, context):
        mean = lsgd.average().apply
        more = lambda carry: carry[0] < context.round  # noqa: E731
        again = lambda carry: (carry[0] + 1, mean(carry[1], state, context)[0])  # noqa: E731
        return jax.lax.while_loop(more, again, (0, tree))[1], state

    rule = lsgd.SyncRule(lambda tree, *_: lsgd.RuleState(), apply)
    with pytest.warns(RuntimeWarning, match=r"train\(\): bytes cannot be") as caught:
        _, history = train(rule, positions=1)
    assert len(caught) == 1 and np.isnan(history["bytes"]).all()
    assert np.isfinite(history["loss"]).all()


def test_unreadable_program_trains_with_one_warning(monkeypatch):
    def fail(*args, **kwargs):
        raise IndexError("unknown instruction")

    monkeypatch.setattr(DeviceBytes, "bytes_per_round", fail)
    with pytest.warns(RuntimeWarning, match="IndexError: unknown instr") as caught:
        _, history = train(lsgd.average(), num_batches=5)
    assert len(caught) == 1 and "device_bytes" not in history
    assert history["bytes"][-1] > 0


def test_failing_program_raises_without_a_warning():
    def apply(tree, state, context):
        raise RuntimeError("a rule that fails")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="a rule that fails"):
            train(lsgd.SyncRule(lambda tree, *_: lsgd.RuleState(), apply))


@pytest.mark.parametrize("positions", [4, in_full(1)])
def test_evaluation_of_equal_workers_sends_nothing(positions):
    norm = {"evaluate": optax.tree.norm}
    _, history = train(lsgd.diloco(), positions=positions, **norm)
    _, without = train(lsgd.diloco(), positions=positions)
    for name in ("bytes", "device_bytes"):
        assert name not in history or (history[name] == without[name]).all()
    assert ("device_bytes" in history) == (positions > 1)


def test_evaluation_of_different_workers_is_counted():
    options = {"evaluate": optax.tree.norm, "evaluate_every": 2}
    state, history = train(lsgd.gossip("ring"), **options)
    _, without = train(lsgd.gossip("ring"))
    evaluations = history["round"] // 2
    size = 4 * sum(x.size for x in jax.tree.leaves(network()))
    extra = history["bytes"] - without["bytes"]
    assert extra.tolist() == (evaluations * -(-2 * 7 * size // 8)).tolist()
    ops = lsgd.collective_ops(mean_over_workers, state.workers.params)
    expected = evaluations * total_bytes_sent(ops)[1]
    extra = history["device_bytes"] - without["device_bytes"]
    assert expected[-1] > 0 and np.abs(extra - expected).max() <= 1


def test_device_bytes_are_unknown_after_an_unreadable_round():
    cluster = cluster_of(lsgd.average())
    counter = ByteCounter(cluster.bytes_sent, cluster.init(network()))
    known = ByteRange(8.0, 8.0)
    assert "device_bytes" not in counter.add_evaluation(0, 0.0)
    assert counter.add_round(1, known)["device_bytes"] == 8
    assert np.isnan(counter.add_round(2, None)["device_bytes"])
    assert np.isnan(counter.add_round(3, known)["device_bytes"])


def test_numbers_without_a_mean_are_not_counted():
    tree = {"w": jnp.zeros((4, 1000), jnp.bfloat16), "count": jnp.zeros((4,), int)}
    assert all_reduce_bytes(tree) == 6000
    assert all_reduce_bytes({"count": tree["count"]}) == 0
