"""Laws that every rule of the table obeys, wherever its workers live."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    PLACEMENTS,
    RULES,
    WORKERS,
    algorithm,
    assert_close,
    assert_same,
    batches,
    cluster,
    loss_fn,
    mesh,
    network,
    pairs,
    run,
    stack,
)

import localsgd_jax as lsgd

UNEVEN = lsgd.at([1, 4, 5, 7])
rules = pytest.mark.parametrize("name", RULES)


def tried(*places, **wanted):
    """Runs a test for the rules that are as wanted, at the places given."""
    return pytest.mark.parametrize("name, place", pairs(places, **wanted))


def shares(seed=3):
    weight = np.random.default_rng(seed).uniform(0.5, 2, WORKERS).astype(np.float32)
    weight[2] = 0
    return weight


@tried(*[place for place in PLACEMENTS if place != "simulate"])
@pytest.mark.parametrize("weight", [None, shares()], ids=["equal", "weighted"])
def test_every_placement_gives_the_numbers_of_simulate(name, place, weight):
    expected, losses = run(cluster("simulate", name), batches(8), UNEVEN, weight)
    state, seen = run(cluster(place, name), batches(8), UNEVEN, weight)
    assert_close(state, expected)
    np.testing.assert_allclose(seen, losses, rtol=1e-5, atol=1e-6)


@tried("simulate", "mesh", "lanes")
def test_gated_is_by_hand(name, place):
    workers = cluster(place, name)
    expected, _ = run(workers, batches(8), UNEVEN)
    step, state = jax.jit(lsgd.gated(workers, UNEVEN)), workers.init(network())
    for batch in batches(8):
        state, metrics = step(state, batch)
        assert metrics["loss"].shape == (WORKERS,)
    assert_close(state, expected)


@tried("simulate", "mesh", "lanes")
def test_fused_is_by_hand(name, place):
    workers = cluster(place, name)
    weight = shares()
    expected, losses = run(workers, batches(6), lsgd.every(3), weight)
    one_round, state = jax.jit(lsgd.fused(workers)), workers.init(network())
    for start in (0, 3):
        state, metrics = one_round(state, stack(batches(6)[start : start + 3]), weight)
        np.testing.assert_allclose(
            metrics["loss"], losses[start : start + 3], rtol=1e-5, atol=1e-6
        )
    assert_close(state, expected)


@tried("mesh", agrees=True)
def test_agreeing_workers_are_equal_after_a_synchronisation(name, place):
    workers = cluster(place, name)
    state, _ = run(workers, batches(3), lsgd.every(3))
    for leaf in jax.tree.leaves(state.workers.params):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))


@pytest.mark.parametrize("name", ["average", "chain", "when_every_round"])
def test_period_one_with_sgd_is_large_batch_sgd(name):
    optimizer = optax.sgd(0.1)
    state, _ = run(
        PLACEMENTS["mesh"](algorithm(RULES[name].rule, optimizer)),
        batches(20),
        lsgd.every(1),
    )
    params = jax.tree.map(jnp.asarray, network())
    opt_state = optimizer.init(params)
    for inputs, targets in batches(20):
        joined = inputs.reshape(-1, 3), targets.reshape(-1)
        updates, opt_state = optimizer.update(
            jax.grad(loss_fn)(params, joined), opt_state
        )
        params = optax.apply_updates(params, updates)
    assert_close(lsgd.consensus(state), params)


@pytest.mark.parametrize("name", ["average", "keep"])
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(0.05),
        optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)),
        optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2),
        optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(5)),
        optax.polyak_sgd(),
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    ],
    ids=["adam", "clip", "accumulate", "lbfgs", "polyak", "plateau"],
)
def test_one_worker_is_plain_optax(name, optimizer):
    made = algorithm(RULES[name].rule, optimizer)
    # Few steps: on changing batches L-BFGS multiplies rounding errors.
    state, _ = run(lsgd.simulate(made, 1), batches(3, workers=1), lsgd.every(2))
    optimizer = optax.with_extra_args_support(optimizer)

    @jax.jit
    def step(params, opt_state, batch):
        value, grad = jax.value_and_grad(loss_fn)(params, batch)
        value_fn = functools.partial(loss_fn, batch=batch)
        extra = {"value": value, "grad": grad, "value_fn": value_fn}
        updates, opt_state = optimizer.update(grad, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    params = jax.tree.map(jnp.asarray, network())
    opt_state = optimizer.init(params)
    for inputs, targets in batches(3, workers=1):
        params, opt_state = step(params, opt_state, (inputs[0], targets[0]))
    assert_close(lsgd.consensus(state), params, rtol=1e-4, atol=1e-5)


@tried("lanes", symmetric=True)
def test_worker_order_does_not_matter(name, place):
    order = np.random.default_rng(5).permutation(WORKERS)
    workers = cluster(place, name)
    weight = shares()
    state, _ = run(workers, batches(6), lsgd.every(2), weight)
    dealt = jax.tree.map(lambda leaf: leaf[order], batches(6))
    permuted, _ = run(workers, dealt, lsgd.every(2), weight[order])
    pick = lambda tree: jax.tree.map(lambda leaf: leaf[order], tree)  # noqa: E731
    expected = state._replace(workers=pick(state.workers), own=pick(state.own))
    assert_close(permuted, expected)


@rules
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_equal_weights_are_no_weights(name, share):
    workers = cluster("mesh", name)
    plain, _ = run(workers, batches(6), lsgd.every(2))
    weighted, _ = run(workers, batches(6), lsgd.every(2), np.full(WORKERS, share))
    assert_close(weighted, plain)


@tried("simulate", "mesh", "lanes", agrees=True)
def test_weight_zero_leaves_a_worker_out_and_it_rejoins(name, place):
    workers = cluster(place, name)
    weight = np.ones(WORKERS, np.float32)
    weight[3] = 0
    state, _ = run(workers, batches(3), lsgd.never())
    broken = state._replace(
        workers=state.workers._replace(
            params=jax.tree.map(lambda x: x.at[3].set(jnp.nan), state.workers.params)
        )
    )
    for before in (state, broken):
        params = workers.sync(before, weight).workers.params
        expected = workers.sync(state, weight).workers.params
        for leaf, right in zip(
            jax.tree.leaves(params), jax.tree.leaves(expected), strict=True
        ):
            assert np.isfinite(leaf).all()
            np.testing.assert_array_equal(leaf, right)
            np.testing.assert_array_equal(leaf[3], leaf[0])


def test_weights_are_shares():
    target = np.arange(4, dtype=np.float32)
    made = lsgd.local_sgd(
        lambda w, b: (w - b) ** 2, optax.sgd(0.5), rule=lsgd.average()
    )
    cluster = lsgd.simulate(made, workers=4)
    state, _ = cluster.step(cluster.init(np.float32(9)), target)
    np.testing.assert_array_equal(state.workers.params, target)
    synced = cluster.sync(state, np.array([1.0, 2.0, 0.0, 5.0]))
    np.testing.assert_allclose(synced.workers.params, np.full(4, (2 + 15) / 8))


@tried("simulate", "lanes")
def test_nobody_alive_changes_nothing_but_the_round(name, place):
    workers = cluster(place, name)
    state, _ = run(workers, batches(3), lsgd.every(2))
    after = workers.sync(state, np.zeros(WORKERS))
    assert int(after.round) == int(state.round) + 1
    assert_same(after._replace(round=state.round), state)


@tried("simulate", "mesh")
def test_resumed_is_uninterrupted_bit_for_bit(name, place):
    workers = cluster(place, name)
    whole, _ = run(workers, batches(8), lsgd.every(3))
    half, _ = run(workers, batches(8)[:4], lsgd.every(3))  # in the middle of a round
    stored = jax.tree.map(np.asarray, half)
    resumed, _ = run(workers, batches(8)[4:], lsgd.every(3), state=stored)
    assert_same(resumed, whole)


def test_when_waits_for_its_round():
    rule = lsgd.when(lsgd.every(2), lsgd.average())
    cluster = lsgd.simulate(algorithm(rule), WORKERS)
    state, _ = run(cluster, batches(1), lsgd.never())
    once = cluster.sync(state)
    assert_same(once.workers, state.workers)
    twice = cluster.sync(once).workers.params["out"]
    np.testing.assert_array_equal(twice, np.broadcast_to(twice[0], twice.shape))
    assert not np.array_equal(twice, once.workers.params["out"])


HIERARCHIES = {
    "simulate": lambda made: lsgd.simulate(made, (2, 4), axis=("pod", "worker")),
    "mesh": lambda made: lsgd.on_mesh(
        made, mesh(pod=2, worker=4), axis=("pod", "worker")
    ),
    "lanes": lambda made: lsgd.on_mesh(
        made, mesh(pod=2, worker=2), workers=8, axis=("pod", "worker")
    ),
    "sharded": lambda made: lsgd.on_mesh(
        made, mesh(pod=2, worker=2, model=2), workers=8, axis=("pod", "worker")
    ),
}


@pytest.mark.parametrize("place", HIERARCHIES)
def test_two_axes_average_within_pods_and_now_and_then_across(place):
    rule = lsgd.chain(
        lsgd.average("worker"), lsgd.when(lsgd.every(2), lsgd.average("pod"))
    )
    cluster = HIERARCHIES[place](algorithm(rule))
    state, _ = run(cluster, batches(2), lsgd.never())
    before = np.asarray(state.workers.params["out"])
    pods = before.reshape(2, 4, -1).mean(1)
    within = cluster.sync(state)
    np.testing.assert_allclose(
        within.workers.params["out"], np.repeat(pods, 4, axis=0), rtol=1e-6
    )
    across = cluster.sync(within).workers.params["out"]
    np.testing.assert_allclose(
        across, np.broadcast_to(before.mean(0), before.shape), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("place", HIERARCHIES)
def test_a_rule_over_both_axes_is_one_over_all_workers(place):
    made = algorithm(lsgd.average(("pod", "worker")))
    expected, _ = run(
        PLACEMENTS["simulate"](algorithm(lsgd.average())), batches(6), lsgd.every(3)
    )
    state, _ = run(HIERARCHIES[place](made), batches(6), lsgd.every(3))
    assert_close(state, expected)


@pytest.mark.parametrize("place", HIERARCHIES)
@pytest.mark.parametrize("dead", [[2], [0, 1, 2, 3]], ids=["worker", "pod"])
def test_a_pod_weighs_what_its_workers_weigh_together(place, dead):
    weight = shares()
    weight[dead] = 0
    levels = lsgd.chain(lsgd.average("worker"), lsgd.average("pod"))
    flat = PLACEMENTS["simulate"](algorithm(lsgd.average()))
    expected, _ = run(flat, batches(6), lsgd.every(3), weight)
    state, _ = run(
        HIERARCHIES[place](algorithm(levels)), batches(6), lsgd.every(3), weight
    )
    assert_close(state.workers, expected.workers)


@pytest.mark.parametrize("name", ["anchored", "average", "when"])
def test_a_chain_of_one_is_its_link(name):
    link, _ = run(cluster("simulate", name), batches(6), lsgd.every(2))
    chain = lsgd.simulate(algorithm(lsgd.chain(RULES[name].rule)), WORKERS)
    state, _ = run(chain, batches(6), lsgd.every(2))
    assert_close(state.workers, link.workers)


@pytest.mark.parametrize("place", ["simulate", "mesh", "lanes"])
def test_both_parts_of_a_rules_state_in_numbers(place):
    """The rule `anchored` of the table against NumPy, round by round."""
    verbs = cluster(place, "anchored")
    state = verbs.init(network())
    anchor, velocity, own = network()["out"].astype(np.float64), 0.0, np.zeros((8, 4))
    for turn, batch in enumerate(batches(3), 1):
        state, _ = verbs.step(state, batch)
        x = np.asarray(state.workers.params["out"], np.float64)
        velocity = 0.9 * velocity + anchor - x.mean(0)
        anchor = anchor - 0.7 * velocity
        own = own + 0.1 * turn * (x - anchor[None])
        state = verbs.sync(state)
        agreed = state.agreed["params"]
        np.testing.assert_allclose(agreed[0]["out"], anchor, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(agreed[1]["out"], velocity, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            state.own["params"]["out"], own, rtol=1e-4, atol=1e-5
        )


LEVELS = {
    "outer": lambda: lsgd.outer(optax.sgd(0.7, momentum=0.9), "pod"),
    "quantize": lambda: lsgd.outer(
        optax.sgd(0.7), lsgd.quantize(lsgd.average("pod"), 8, block=8)
    ),
    "fragment": lambda: lsgd.fragment(lsgd.outer(optax.sgd(0.7), "pod"), 2),
    "overlap": lambda: lsgd.overlap(lsgd.average("pod")),
    "mix": lambda: lsgd.mix(lsgd.diloco(), 0.5),
}


@pytest.mark.parametrize("place", [name for name in HIERARCHIES if name != "simulate"])
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("weight", [None, shares()], ids=["equal", "weighted"])
def test_rules_across_pods_in_some_rounds_after_a_mean_within(name, place, weight):
    """After a synchronous phase, pods agree in every second round."""
    across = lsgd.when(lsgd.post_local(2, 2), LEVELS[name]())
    made = algorithm(lsgd.chain(lsgd.average("worker"), across))
    verbs = HIERARCHIES["simulate"](made)
    expected, _ = run(verbs, batches(8), lsgd.post_local(2, 2), weight)
    state, _ = run(HIERARCHIES[place](made), batches(8), lsgd.post_local(2, 2), weight)
    assert_close(state, expected, rtol=1e-4, atol=1e-5)
    out = np.asarray(state.workers.params["out"]).reshape(2, 4, -1)
    if name != "overlap":  # Its progress since the snapshot is each worker's own.
        np.testing.assert_allclose(out, np.repeat(out[:, :1], 4, axis=1), rtol=1e-6)


def test_an_outer_optimizer_across_pods_by_hand():
    rule = lsgd.chain(
        lsgd.average("worker"),
        lsgd.when(lsgd.every(2), lsgd.outer(optax.sgd(0.5), "pod")),
    )
    cluster = HIERARCHIES["simulate"](algorithm(rule))
    state, _ = run(cluster, batches(2), lsgd.never())
    before = np.asarray(state.workers.params["out"], np.float64)
    anchor = network()["out"].astype(np.float64)
    once = cluster.sync(state)
    twice = cluster.sync(once).workers.params["out"]
    expected = anchor - 0.5 * (anchor - before.mean(0))
    np.testing.assert_allclose(twice, np.tile(expected, (8, 1)), rtol=1e-5)
