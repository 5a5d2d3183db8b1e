"""Rules for optimizer state: averaged moments, and resets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import (
    WORKERS,
    algorithm,
    assert_same,
    batches,
    mesh,
    network,
    run_manually,
)
from harness.selection import keep

import localsgd_jax as lsgd

ADAM = optax.adam(0.05)


def train_three_steps(rule, placement=None):
    rules = {"params": lsgd.average(), "opt_state": rule}
    cluster = (placement or (lambda made: lsgd.simulate(made, WORKERS)))(
        algorithm(rules, ADAM)
    )
    return cluster, run_manually(cluster, batches(3), lsgd.never())[0]


PLACEMENTS = {
    "simulate": None,
    "mesh": lambda made: lsgd.on_mesh(made, mesh(worker=8)),
    "lanes": lambda made: lsgd.on_mesh(made, mesh(worker=2), workers=8),
}


@pytest.mark.parametrize("placement", keep(PLACEMENTS, ["lanes"]))
@pytest.mark.parametrize(
    "weight", [None, np.array([1, 2, 0, 1, 3, 1, 0, 2.0])], ids=["equal", "weighted"]
)
def test_floating_only_averages_moments_and_keeps_counts(placement, weight):
    cluster, state = train_three_steps(
        lsgd.floating_only(lsgd.average()), PLACEMENTS[placement]
    )
    before = state.workers.opt_state[0]
    # Counts differ, as they do after a worker has missed steps.
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


def test_moments_with_a_longer_period():
    """DES-LOC: parameters in every round, moments in every second one."""
    rule = lsgd.when(lsgd.every(2), lsgd.floating_only(lsgd.average()))
    cluster, state = train_three_steps(rule)
    once = cluster.sync(state)
    assert_same(once.workers.opt_state, state.workers.opt_state)
    assert np.ptp(once.workers.params["out"], axis=0).max() == 0
    twice = cluster.sync(once).workers.opt_state[0]
    assert np.ptp(twice.nu["out"], axis=0).max() == 0


@pytest.mark.parametrize("placement", keep(PLACEMENTS, ["lanes"]))
def test_reset_to_init(placement):
    cluster, state = train_three_steps(lsgd.reset_to_init(), PLACEMENTS[placement])
    initial = cluster.init(network()).workers.opt_state
    assert_same(cluster.sync(state).workers.opt_state, initial)
    assert int(state.workers.opt_state[0].count[0]) == 3


def test_reset_of_floating_leaves_keeps_the_count():
    cluster, state = train_three_steps(lsgd.floating_only(lsgd.reset_to_init()))
    after = cluster.sync(state).workers.opt_state[0]
    assert after.count.tolist() == [3] * WORKERS
    assert not np.any(after.mu["out"]) and not np.any(after.nu["out"])


def test_reset_restores_the_initial_value_and_not_zero():
    """Adagrad's accumulator starts at 0.1; at 0 the next step would be huge."""
    rules = {"params": lsgd.average(), "opt_state": lsgd.reset_to_init()}
    cluster = lsgd.simulate(algorithm(rules, optax.adagrad(0.1)), WORKERS)
    state = cluster.sync(run_manually(cluster, batches(2), lsgd.never())[0])
    total = state.workers.opt_state[0].sum_of_squares["out"]
    np.testing.assert_allclose(total, np.full((WORKERS, 4), 0.1), rtol=1e-6)


def test_floating_only_skips_integers_and_keys():
    """Also skips booleans and None; only floating point leaves are averaged."""
    tree = {
        "x": jnp.zeros(2),
        "n": jnp.int32(4),
        "b": jnp.array(True),
        "k": jax.random.key(0),
        "none": None,
    }
    rule = {"field": lsgd.floating_only(lsgd.average())}
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


def test_mean_of_local_emas_is_the_ema_of_the_mean():
    """An EMA per worker needs no communication, because it is linear."""

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
        (
            lambda: lsgd.floating_only(lsgd.average),
            r"floating_only\(rule\): a SyncRule",
        ),
        (
            lambda: lsgd.reset_to_init().init({"k": jax.random.key(0)}),
            r"reset_to_init\(\): keys differ.*at \['k'\]; use "
            r"floating_only\(reset_to_init\(\)\)",
        ),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(TypeError, match=message):
        call()
