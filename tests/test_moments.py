"""What becomes of an optimizer's state at a synchronisation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import WORKERS, algorithm, assert_same, batches, mesh, network, run

import localsgd_jax as lsgd

ADAM = optax.adam(0.05)


def trained(rule, place=None):
    rules = {"params": lsgd.average(), "opt_state": rule}
    cluster = (place or (lambda made: lsgd.simulate(made, WORKERS)))(
        algorithm(rules, ADAM)
    )
    return cluster, run(cluster, batches(3), lsgd.never())[0]


PLACES = {
    "simulate": None,
    "mesh": lambda made: lsgd.on_mesh(made, mesh(worker=8)),
    "lanes": lambda made: lsgd.on_mesh(made, mesh(worker=2), workers=8),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "weight", [None, np.array([1, 2, 0, 1, 3, 1, 0, 2.0])], ids=["equal", "weighted"]
)
def test_moments_are_averaged_and_counts_are_not(place, weight):
    cluster, state = trained(lsgd.floats(lsgd.average()), place=PLACES[place])
    before = state.workers.opt_state[0]
    # Counts that differ, as they do after a worker was away.
    counts = jnp.arange(WORKERS, dtype=before.count.dtype)
    moments = before._replace(count=counts), *state.workers.opt_state[1:]
    state = state._replace(workers=state.workers._replace(opt_state=moments))
    after = cluster.sync(state, weight).workers.opt_state[0]
    np.testing.assert_array_equal(after.count, counts)
    for name in ("mu", "nu"):
        rows = np.asarray(getattr(before, name)["out"], np.float64)
        expected = np.average(rows, axis=0, weights=weight)
        np.testing.assert_allclose(
            getattr(after, name)["out"], np.stack([expected] * 8), rtol=1e-5
        )


def test_moments_on_a_period_of_their_own():
    """DES-LOC: parameters every round, moments every second."""
    rule = lsgd.when(lsgd.every(2), lsgd.floats(lsgd.average()))
    cluster, state = trained(rule)
    once = cluster.sync(state)
    assert_same(once.workers.opt_state, state.workers.opt_state)
    assert np.ptp(once.workers.params["out"], axis=0).max() == 0
    twice = cluster.sync(once).workers.opt_state[0]
    assert np.ptp(twice.nu["out"], axis=0).max() == 0


@pytest.mark.parametrize("place", PLACES)
def test_an_optimizer_begins_anew(place):
    cluster, state = trained(lsgd.reset(), place=PLACES[place])
    fresh = cluster.init(network()).workers.opt_state
    assert_same(cluster.sync(state).workers.opt_state, fresh)
    assert int(state.workers.opt_state[0].count[0]) == 3


def test_a_reset_may_let_the_count_go_on():
    cluster, state = trained(lsgd.floats(lsgd.reset()))
    after = cluster.sync(state).workers.opt_state[0]
    assert after.count.tolist() == [3] * WORKERS
    assert not np.any(after.mu["out"]) and not np.any(after.nu["out"])


def test_a_reset_goes_back_to_the_start_and_not_to_zero():
    """Adagrad's accumulator starts at 0.1; at 0 the next step would be huge."""
    rules = {"params": lsgd.average(), "opt_state": lsgd.reset()}
    cluster = lsgd.simulate(algorithm(rules, optax.adagrad(0.1)), WORKERS)
    state = cluster.sync(run(cluster, batches(2), lsgd.never())[0])
    total = state.workers.opt_state[0].sum_of_squares["out"]
    np.testing.assert_allclose(total, np.full((WORKERS, 4), 0.1), rtol=1e-6)


def test_what_has_no_mean_goes_past_a_rule():
    """Integers, booleans, keys and absent parts, in a tree where only floats meet."""
    tree = {
        "x": jnp.zeros(2),
        "n": jnp.int32(4),
        "b": jnp.array(True),
        "k": jax.random.key(0),
        "none": None,
    }
    rule = {"field": lsgd.floats(lsgd.average())}
    made = lsgd.from_train_step(lambda state, batch: (state, batch), rule)
    cluster = lsgd.simulate(made, 2)
    state = cluster.init({"field": tree})
    state.workers["field"]["x"] = jnp.array([[1.0, 2.0], [3.0, 6.0]])
    state.workers["field"]["n"] = jnp.array([4, 7])
    after = cluster.sync(state).workers["field"]
    assert after["x"].tolist() == [[2, 4], [2, 4]]
    assert after["n"].tolist() == [4, 7] and after["b"].tolist() == [True, True]
    keys = (jax.random.key_data(s["k"]) for s in (after, state.workers["field"]))
    np.testing.assert_array_equal(*keys)
    assert after["none"] is None


def test_the_mean_of_averages_over_time_is_that_of_the_consensus():
    """A worker's own EMA needs no communication: the mean of EMAs is one of means."""

    def train_step(state, batch):
        params = state["params"] - 0.5 * (state["params"] - batch)
        ema = optax.incremental_update(params, state["ema"], 0.1)
        return {"params": params, "ema": ema}, {"loss": jnp.sum(params)}

    cluster = lsgd.simulate(lsgd.from_train_step(train_step, lsgd.average()), WORKERS)
    state = cluster.init({"params": jnp.zeros(3), "ema": jnp.zeros(3)})
    expected = np.zeros(3)
    for t, batch in enumerate(np.random.default_rng(0).normal(size=(9, WORKERS, 3))):
        state, _ = cluster.step(state, batch.astype(np.float32))
        expected = 0.9 * expected + 0.1 * np.asarray(lsgd.consensus(state), np.float64)
        state = cluster.sync(state) if t % 3 == 2 else state
    np.testing.assert_allclose(lsgd.consensus(state, "ema"), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lsgd.floats(lsgd.average), r"floats\(rule\): a SyncRule is needed"),
        (
            lambda: lsgd.reset().init({"k": jax.random.key(0)}),
            r"reset\(\): a key.*at \['k'\]; wrap it: floats\(reset\(\)\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(TypeError, match=message):
        call()
