"""Invariants of all rules of the table, in every placement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.cases import (
    PLACEMENTS,
    REPRESENTATIVE_RULES,
    WORKERS,
    assert_close,
    assert_same,
    batches,
    cluster,
    network,
    random_weights,
    rule_placement_pairs,
    run_manually,
    stack,
)
from harness.rule_arrays import K, on_two_devices, random_rounds, sync_arrays
from harness.selection import in_full

import localsgd_jax as lsgd

UNEVEN = lsgd.at_steps([1, 4, 5, 7])


def parametrize_rules(*placements, main_rules=(), **properties):
    """Runs a test for the rules with given properties in given placements."""
    return pytest.mark.parametrize(
        "name, placement", rule_placement_pairs(placements, main_rules, **properties)
    )


@parametrize_rules(
    *[name for name in PLACEMENTS if name != "simulate"],
    main_rules=REPRESENTATIVE_RULES,
)
@pytest.mark.parametrize(
    "weight",
    [in_full(None, id="equal"), pytest.param(random_weights(), id="weighted")],
)
def test_every_placement_matches_simulate(name, placement, weight):
    expected, losses = run_manually(
        cluster("simulate", name), batches(8), UNEVEN, weight
    )
    state, step_losses = run_manually(
        cluster(placement, name), batches(8), UNEVEN, weight
    )
    assert_close(state, expected)
    np.testing.assert_allclose(step_losses, losses, rtol=1e-5, atol=1e-6)


@parametrize_rules("simulate", "mesh", "lanes", main_rules=REPRESENTATIVE_RULES)
def test_gated_step_matches_manual_loop(name, placement):
    tested = cluster(placement, name)
    expected, _ = run_manually(tested, batches(8), UNEVEN)
    step, state = jax.jit(lsgd.gated(tested, UNEVEN)), tested.init(network())
    for batch in batches(8):
        state, metrics = step(state, batch)
        assert metrics["loss"].shape == (WORKERS,)
    assert_close(state, expected)


@parametrize_rules("simulate", "mesh", "lanes", main_rules=REPRESENTATIVE_RULES)
def test_fused_round_matches_manual_loop(name, placement):
    tested = cluster(placement, name)
    weight = random_weights()
    expected, losses = run_manually(tested, batches(6), lsgd.every(3), weight)
    one_round, state = jax.jit(lsgd.fused(tested)), tested.init(network())
    for start in (0, 3):
        state, metrics = one_round(state, stack(batches(6)[start : start + 3]), weight)
        np.testing.assert_allclose(
            metrics["loss"], losses[start : start + 3], rtol=1e-5, atol=1e-6
        )
    assert_close(state, expected)


@parametrize_rules(
    "mesh", "lanes", main_rules=REPRESENTATIVE_RULES, reaches_consensus=True
)
def test_workers_are_equal_after_a_synchronisation(name, placement):
    tested = cluster(placement, name)
    state, _ = run_manually(tested, batches(3), lsgd.every(3))
    for leaf in jax.tree.leaves(state.workers.params):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))


@parametrize_rules("lanes", main_rules=REPRESENTATIVE_RULES, symmetric=True)
def test_worker_order_does_not_matter(name, placement):
    order = np.random.default_rng(5).permutation(WORKERS)
    tested = cluster(placement, name)
    weight = random_weights()
    state, _ = run_manually(tested, batches(6), lsgd.every(2), weight)
    reordered = jax.tree.map(lambda leaf: leaf[order], batches(6))
    permuted, _ = run_manually(tested, reordered, lsgd.every(2), weight[order])
    pick = lambda tree: jax.tree.map(lambda leaf: leaf[order], tree)  # noqa: E731
    expected = state._replace(workers=pick(state.workers), local=pick(state.local))
    assert_close(permuted, expected)


@parametrize_rules("mesh", "lanes", main_rules=REPRESENTATIVE_RULES)
@pytest.mark.parametrize("weight", [in_full(1.0), 0.25])
def test_equal_weights_match_no_weights(name, placement, weight):
    tested = cluster(placement, name)
    plain, _ = run_manually(tested, batches(6), lsgd.every(2))
    weighted, _ = run_manually(
        tested, batches(6), lsgd.every(2), np.full(WORKERS, weight)
    )
    assert_close(weighted, plain)


@parametrize_rules(
    *("simulate", "mesh", "lanes"),
    main_rules=REPRESENTATIVE_RULES,
    reaches_consensus=True,
)
def test_worker_of_weight_zero_is_dropped_and_receives_the_result(name, placement):
    tested = cluster(placement, name)
    weight = np.ones(WORKERS, np.float32)
    weight[3] = 0
    state, _ = run_manually(tested, batches(3), lsgd.never())
    broken = state._replace(
        workers=state.workers._replace(
            params=jax.tree.map(lambda x: x.at[3].set(jnp.nan), state.workers.params)
        )
    )
    for before in (state, broken):
        params = tested.sync(before, weight).workers.params
        expected = tested.sync(state, weight).workers.params
        for leaf, right in zip(
            jax.tree.leaves(params), jax.tree.leaves(expected), strict=True
        ):
            assert np.isfinite(leaf).all()
            np.testing.assert_array_equal(leaf, right)
            np.testing.assert_array_equal(leaf[3], leaf[0])


@parametrize_rules("simulate", "lanes", main_rules=REPRESENTATIVE_RULES)
def test_all_zero_weights_is_identity(name, placement):
    tested = cluster(placement, name)
    state, _ = run_manually(tested, batches(3), lsgd.every(2))
    after = tested.sync(state, np.zeros(WORKERS))
    assert int(after.round) == int(state.round) + 1
    assert_same(after._replace(round=state.round), state)


@parametrize_rules("simulate", "mesh", "lanes", main_rules=REPRESENTATIVE_RULES)
def test_resumed_run_is_bitwise_identical(name, placement):
    tested = cluster(placement, name)
    uninterrupted, _ = run_manually(tested, batches(8), lsgd.every(3))
    # The run is interrupted in the middle of a round.
    half, _ = run_manually(tested, batches(8)[:4], lsgd.every(3))
    stored = jax.tree.map(np.asarray, half)
    resumed, _ = run_manually(tested, batches(8)[4:], lsgd.every(3), state=stored)
    assert_same(resumed, uninterrupted)


@pytest.mark.parametrize(
    "rule",
    [
        lsgd.median(),
        lsgd.trimmed_mean(0.25),
        lsgd.shard_state(lsgd.average(), K),
        lsgd.gossip("ring"),
        lsgd.gossip("one-peer"),
        lsgd.top_k(lsgd.average(), 1.0),
        lsgd.cast(lsgd.average(), jnp.bfloat16),
    ],
    ids=lambda rule: rule.name,
)
@pytest.mark.parametrize(
    "placement",
    [in_full(None, id="simulate"), pytest.param(on_two_devices, id="lanes")],
)
def test_equal_workers_are_unchanged(rule, placement):
    """Also if the compiler knows that all workers are equal."""
    x = np.round(random_rounds(2) * 4)  # Integers, which bfloat16 represents exactly.
    expected = np.tile(x.mean(1, keepdims=True), (1, K, 1))
    rule = lsgd.chain(lsgd.average(), rule)
    synced, _ = sync_arrays(rule, x, placement=placement)
    np.testing.assert_allclose(synced, expected, atol=1e-6)


@pytest.mark.parametrize("placement", [in_full("simulate"), in_full("mesh"), "lanes"])
def test_shared_and_local_state_match_numpy(placement):
    """Compares `momentum_rule` of the table with NumPy, round by round."""
    tested = cluster(placement, "momentum_rule")
    state = tested.init(network())
    anchor, velocity, local = network()["out"].astype(np.float64), 0.0, np.zeros((8, 4))
    for round, batch in enumerate(batches(3), 1):
        state, _ = tested.step(state, batch)
        x = np.asarray(state.workers.params["out"], np.float64)
        velocity = 0.9 * velocity + anchor - x.mean(0)
        anchor = anchor - 0.7 * velocity
        local = local + 0.1 * round * (x - anchor[None])
        state = tested.sync(state)
        shared = state.shared["params"]
        np.testing.assert_allclose(shared[0]["out"], anchor, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(shared[1]["out"], velocity, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            state.local["params"]["out"], local, rtol=1e-4, atol=1e-5
        )
