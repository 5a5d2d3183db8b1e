"""Programs for the rounds of a cycle: their number and their values."""

import jax
import numpy as np
import pytest
from harness.cases import (
    WORKERS,
    algorithm,
    assert_close,
    batches,
    mesh,
    network,
    random_weights,
    run_manually,
)
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.execution.cyclic_round import RoundClass
from localsgd_jax.training.dispatch import Dispatcher

STREAMING = lsgd.fragment(
    lsgd.interpolate(lsgd.delay(lsgd.diloco()), 0.5), 2, rounds_per_fragment=2
)
DELAY = lsgd.interpolate(lsgd.delay(lsgd.diloco()), 0.5)
WITH_TAU = lsgd.with_lead(lsgd.evenly_spaced(12, 2), 2)


def round_programs(rule, positions=4):
    """Returns the choice of programs for a rule on several devices."""
    cluster = lsgd.on_mesh(algorithm(rule), mesh(worker=positions), WORKERS)
    return Dispatcher(cluster, None, cluster.init(network())).round_programs


def test_equal_rounds_share_a_program():
    programs = round_programs(lsgd.when(lsgd.every(4), lsgd.average()))
    assert not programs.are_alike
    chosen = [programs.choose(number) for number in range(1, 10)]
    idle, due = RoundClass(4, 1), RoundClass(4, 0)
    assert chosen == [idle, idle, idle, due] * 2 + [idle]


@pytest.mark.parametrize(
    "rule, positions", [(lsgd.diloco(), 4), (STREAMING, 1)], ids=["diloco", "1 device"]
)
def test_one_program_where_rounds_are_equal_or_nothing_is_sent(rule, positions):
    programs = round_programs(rule, positions)
    assert programs.are_alike
    assert {programs.choose(number) for number in range(9)} == {None}


def test_number_of_programs_is_bounded():
    """Further rounds run the program with a traced round number."""

    def apply(tree, state, context):
        position = context.round % 20
        if isinstance(position, jax.Array):
            return tree, state
        return jax.tree.map(lambda x: x + position, tree), state

    rule = lsgd.SyncRule(lambda tree, *_: lsgd.RuleState(), apply)
    programs = round_programs(rule)
    chosen = [programs.choose(number) for number in range(1, 41)]
    assert chosen[:20] == [*(RoundClass(20, n) for n in range(1, 17)), *[None] * 4]
    assert chosen[20:] == chosen[:20]


@pytest.mark.parametrize(
    "rule, schedule, weights",
    [
        (STREAMING, WITH_TAU, None),
        in_full(DELAY, lsgd.with_lead(lsgd.every(7), 3), random_weights()),
        in_full(STREAMING, lsgd.every(1), None),
        in_full(lsgd.gossip("one-peer"), lsgd.at_steps([2, 5, 20]), None),
        in_full(lsgd.overlap(lsgd.diloco()), lsgd.every(10), random_weights()),
    ],
    ids=["streaming", "delay", "every_step", "gossip", "overlap"],
)
@pytest.mark.parametrize("max_steps", [4, in_full(64)])
def test_train_matches_manual_loop(rule, schedule, weights, max_steps):
    cluster = lsgd.on_mesh(algorithm(rule), mesh(worker=4), WORKERS)
    expected, _ = run_manually(cluster, batches(26), schedule, weights)
    if not schedule(26):
        expected = cluster.sync(expected, weights)
    state, history = lsgd.train(
        cluster,
        cluster.init(network()),
        batches(26),
        schedule=schedule,
        weights=weights,
        max_steps_per_dispatch=max_steps,
        progress=False,
    )
    assert_close(state, expected, rtol=2e-5, atol=2e-6)
    counts = [cluster.bytes_sent(state, int(r))[1] for r in history["round"]]
    assert history["bytes"].tolist() == np.cumsum(counts).tolist()
