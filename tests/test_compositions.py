"""Rules within rules, drawn at random: the laws hold for all of them."""

import jax
import numpy as np
import optax
import pytest
from cases import (
    PLACEMENTS,
    WORKERS,
    algorithm,
    assert_close,
    assert_same,
    batches,
    network,
    run,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import Checkpoints

MEANS = st.sampled_from(
    [
        lsgd.average,
        lambda: lsgd.quantize(lsgd.average(), 8, block=8),
        lambda: lsgd.cast(lsgd.average()),
        lambda: lsgd.topk(lsgd.average(), 0.5),
        lambda: lsgd.signs(lsgd.average()),
        lsgd.median,
        lambda: lsgd.flatten(lsgd.average()),
    ]
)
RATES = st.sampled_from([0.3, 0.7, 1.0])
AGREE = st.one_of(
    MEANS.map(lambda mean: mean()),
    st.builds(lambda rate, mean: lsgd.outer(optax.sgd(rate), mean()), RATES, MEANS),
    st.builds(lambda rate: lsgd.shard(lsgd.diloco(rate), WORKERS), RATES),
)
ALONE = st.sampled_from([lsgd.elastic, lsgd.gossip, lsgd.keep]).map(lambda f: f())


def wrapped(rules):
    """A rule around one or two others."""
    return st.one_of(
        st.builds(lsgd.mix, rules, st.sampled_from([0.0, 0.4])),
        st.builds(lsgd.overlap, rules),
        st.builds(lsgd.delay, rules),
        st.builds(lambda h, rule: lsgd.when(lsgd.every(h), rule), st.just(2), rules),
        st.builds(lsgd.chain, rules, rules),
        # A shard needs as many rows as workers, which a small fragment has too.
        st.builds(lambda rule: lsgd.fragment(rule, 2, cut=0), rules),
    )


GUARDED = st.builds(lambda rule: lsgd.measured(lsgd.guard(rule)), AGREE)
FLAT = st.one_of(AGREE, ALONE, GUARDED)
RULES = st.one_of(FLAT, wrapped(FLAT), wrapped(wrapped(FLAT)))
WEIGHT = np.array([1, 0.5, 0, 2, 1, 1, 0, 1], np.float32)
DUE = lsgd.at([1, 3, 4, 6])


def check(rule, directory):
    """Any rule: everywhere the same, with nobody nothing, interrupted or not."""
    made = algorithm(rule)
    plain = PLACEMENTS["simulate"](made)
    for weight in (None, WEIGHT):
        expected, _ = run(plain, batches(6), DUE, weight)
        state, _ = run(PLACEMENTS["lanes"](made), batches(6), DUE, weight)
        assert_close(state, expected, rtol=1e-4, atol=1e-5)

    after = plain.sync(expected, np.zeros(WORKERS))
    assert_same(after.workers, expected.workers)
    assert_same(after._replace(round=expected.round), expected)

    step = jax.jit(lsgd.gated(plain, DUE), donate_argnums=0)
    state = plain.init(network())
    for batch in batches(6)[:4]:
        state, _ = step(state, batch)
    with Checkpoints(directory, plain) as checkpoints:
        checkpoints.save(state)
    with Checkpoints(directory, plain) as checkpoints:
        restored, _ = checkpoints.restore(plain.init(network()))
    assert_same(restored, state)
    for batch in batches(6)[4:]:
        state, _ = step(state, batch)
    expected, _ = run(plain, batches(6), DUE)
    assert_close(state, expected, rtol=1e-4, atol=1e-5)


# Each example compiles for seconds: a failing one is shown as it is.
FIXED = settings(
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@settings(FIXED, max_examples=4)
@given(rule=RULES)
def test_a_few_compositions(rule, tmp_path_factory):
    check(rule, tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(FIXED, max_examples=40)
@given(rule=RULES)
def test_many_compositions(rule, tmp_path_factory):
    check(rule, tmp_path_factory.mktemp("checkpoint"))
