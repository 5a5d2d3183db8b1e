"""Invariants of random compositions of rules."""

import jax
import numpy as np
import optax
import pytest
from harness.cases import (
    PLACEMENTS,
    WORKERS,
    algorithm,
    assert_close,
    assert_same,
    batches,
    network,
    run_manually,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import RunCheckpointer

MEANS = st.sampled_from(
    [
        lsgd.average,
        lambda: lsgd.quantize(lsgd.average(), 8, block=8),
        lambda: lsgd.cast(lsgd.average()),
        lambda: lsgd.top_k(lsgd.average(), 0.5),
        lambda: lsgd.scaled_sign(lsgd.average()),
        lambda: lsgd.chunked_top_k(lsgd.average(), 2, chunk=6, decay=0.9),
        lambda: lsgd.clip_to_median_norm(lsgd.top_k(lsgd.average(), 0.5)),
        lsgd.median,
        lambda: lsgd.flatten(lsgd.average()),
    ]
)
RATES = st.sampled_from([0.3, 0.7, 1.0])
CONSENSUS = st.one_of(
    MEANS.map(lambda mean: mean()),
    st.builds(lambda rate, mean: lsgd.outer(optax.sgd(rate), mean()), RATES, MEANS),
    st.builds(lambda rate: lsgd.shard_state(lsgd.diloco(rate), WORKERS), RATES),
)
OTHERS = st.sampled_from([lsgd.elastic_average, lsgd.gossip, lsgd.identity]).map(
    lambda f: f()
)


def wrapped(rules):
    """Returns a strategy for combinators of one or two rules."""
    return st.one_of(
        st.builds(lsgd.interpolate, rules, st.sampled_from([0.0, 0.4])),
        st.builds(lsgd.overlap, rules),
        st.builds(lsgd.delay, rules),
        st.builds(lambda h, rule: lsgd.when(lsgd.every(h), rule), st.just(2), rules),
        st.builds(lsgd.chain, rules, rules),
        st.builds(
            lambda one, two: lsgd.partition(
                {"in": one, "out": two}, lambda path: "out" if "out" in path else "in"
            ),
            rules,
            rules,
        ),
        # shard_state works with any fragment, because it pads to K rows.
        st.builds(lambda rule: lsgd.fragment(rule, 2, split_axis=0), rules),
    )


WITH_METRICS = st.builds(
    lambda rule: lsgd.with_diagnostics(lsgd.drop_outliers(rule)), CONSENSUS
)
SIMPLE = st.one_of(CONSENSUS, OTHERS, WITH_METRICS)
RULES = st.one_of(SIMPLE, wrapped(SIMPLE), wrapped(wrapped(SIMPLE)))
WEIGHT = np.array([1, 0.5, 0, 2, 1, 1, 0, 1], np.float32)
SCHEDULE = lsgd.at_steps([1, 3, 4, 6])


def check_invariants(rule, directory):
    """Asserts equality of placements, no effect of weights 0, and exact resumption."""
    made = algorithm(rule)
    simulated = PLACEMENTS["simulate"](made)
    for weight in (None, WEIGHT):
        expected, _ = run_manually(simulated, batches(6), SCHEDULE, weight)
        state, _ = run_manually(PLACEMENTS["lanes"](made), batches(6), SCHEDULE, weight)
        assert_close(state, expected, rtol=1e-4, atol=1e-5)

    after = simulated.sync(expected, np.zeros(WORKERS))
    assert_same(after.workers, expected.workers)
    assert_same(after._replace(round=expected.round), expected)

    step = jax.jit(lsgd.gated(simulated, SCHEDULE), donate_argnums=0)
    state = simulated.init(network())
    for batch in batches(6)[:4]:
        state, _ = step(state, batch)
    with RunCheckpointer(directory, simulated) as checkpoints:
        checkpoints.save(state)
    with RunCheckpointer(directory, simulated) as checkpoints:
        restored, _ = checkpoints.restore(simulated.init(network()))
    assert_same(restored, state)
    for batch in batches(6)[4:]:
        state, _ = step(state, batch)
    expected, _ = run_manually(simulated, batches(6), SCHEDULE)
    assert_close(state, expected, rtol=1e-4, atol=1e-5)


# Examples are not shrunk, because each compiles for several seconds.
FIXED = settings(
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@settings(FIXED, max_examples=1)
@given(rule=RULES)
def test_one_composition(rule, tmp_path_factory):
    check_invariants(rule, tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.full
@settings(FIXED, max_examples=4)
@given(rule=RULES)
def test_a_few_compositions(rule, tmp_path_factory):
    check_invariants(rule, tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(FIXED, max_examples=40)
@given(rule=RULES)
def test_many_compositions(rule, tmp_path_factory):
    check_invariants(rule, tmp_path_factory.mktemp("checkpoint"))
