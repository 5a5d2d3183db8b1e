"""Batch statistics of workers: those of the union, in NumPy's float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PLACEMENTS, WORKERS, assert_close, assert_same, mesh
from flax import linen, nnx

import localsgd_jax as lsgd

SHARES = np.array([1, 2, 0, 0.5, 3, 1, 0, 2], np.float32)


def data(n=20, d=3, seed=0):
    """What each worker saw, around means that differ: (K, n, d)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(WORKERS, n, d)) * 2 + 5 * rng.normal(size=(WORKERS, 1, d))


def statistics(x, dtype=np.float32):
    """The statistics of each worker, as linen nests them."""
    layer = {"mean": x.mean(1).astype(dtype), "var": x.var(1).astype(dtype)}
    return {"BatchNorm_0": layer, "deeper": {"BatchNorm_1": dict(layer)}}


def synced(cluster, stacked, weight=None, rounds=1):
    """The field after some rounds in which it did not change otherwise."""
    one = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), stacked)
    state = cluster.init({"batch_stats": one})
    state = state._replace(workers={"batch_stats": stacked})
    for _ in range(rounds):
        state = cluster.sync(state, weight)
    return state


def made(rule=None):
    return lsgd.from_train_step(
        lambda state, batch: (state, batch),
        {"batch_stats": rule or lsgd.batch_statistics()},
    )


@pytest.mark.parametrize("place", ["simulate", "mesh", "lanes", "sharded"])
def test_the_merged_variance_is_that_of_the_union(place):
    x = data()
    state = synced(PLACEMENTS[place](made()), statistics(x))
    joined = x.reshape(-1, x.shape[-1])
    for layer in (
        state.workers["batch_stats"]["BatchNorm_0"],
        state.workers["batch_stats"]["deeper"]["BatchNorm_1"],
    ):
        for k in range(WORKERS):
            np.testing.assert_allclose(layer["mean"][k], joined.mean(0), rtol=1e-5)
            np.testing.assert_allclose(layer["var"][k], joined.var(0), rtol=1e-5)


@pytest.mark.parametrize("place", ["simulate", "lanes"])
def test_a_weight_counts_the_examples_that_stand_behind_a_worker(place):
    """Whole weights are so many copies of what the worker saw; 0 even hides a NaN."""
    x, copies = data(), np.array([1, 2, 0, 1, 3, 1, 0, 2])
    stacked = statistics(x)
    stacked["BatchNorm_0"]["var"][2] = np.nan
    state = synced(PLACEMENTS[place](made()), stacked, copies.astype(np.float32))
    joined = np.repeat(x, copies, axis=0).reshape(-1, x.shape[-1])
    layer = state.workers["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(layer["mean"][2], joined.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer["var"][2], joined.var(0), rtol=1e-5)


def test_workers_that_agree_stay_as_they_are():
    """What was merged is not widened once more in the next round."""
    cluster = PLACEMENTS["mesh"](made())
    once = synced(cluster, statistics(data()))
    twice = synced(cluster, statistics(data()), rounds=3)
    assert_close(twice.workers, once.workers)


def test_large_means_do_not_cancel_once_a_mean_is_agreed():
    """Around 10 000, float32 squares have no digit left for a variance of 1."""
    cluster = PLACEMENTS["simulate"](made())
    start = 10_000 + data(seed=1)
    state = synced(cluster, statistics(start))
    later = 10_000 + data(seed=2) / 10
    state = cluster.sync(state._replace(workers={"batch_stats": statistics(later)}))
    seen = statistics(later)["BatchNorm_0"]
    mean, var = (np.asarray(seen[name], np.float64) for name in ("mean", "var"))
    layer = state.workers["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(layer["var"][0], var.mean(0) + mean.var(0), rtol=1e-4)


@pytest.mark.parametrize("place", ["simulate", "lanes"])
def test_nobody_alive_changes_nothing_but_the_round(place):
    cluster = PLACEMENTS[place](made())
    state = synced(cluster, statistics(data()))
    state = state._replace(workers={"batch_stats": statistics(data(seed=4))})
    after = cluster.sync(state, np.zeros(WORKERS))
    assert_same(after._replace(round=state.round), state)


@pytest.mark.parametrize("weight", [None, SHARES], ids=["equal", "weighted"])
def test_other_leaves_are_averaged(weight):
    rows = np.arange(16, dtype=np.float32).reshape(8, 2)
    stacked = statistics(data()) | {"scale": rows, "lonely": {"mean": rows}}
    state = synced(PLACEMENTS["mesh"](made()), stacked, weight)
    expected = np.average(rows, axis=0, weights=weight)
    for leaf in (
        state.workers["batch_stats"]["scale"],
        state.workers["batch_stats"]["lonely"]["mean"],
    ):
        np.testing.assert_allclose(leaf[5], expected, rtol=1e-6)


def test_half_precision_statistics_are_merged_in_float32():
    stacked = statistics(data(), jnp.bfloat16)
    layer = synced(PLACEMENTS["simulate"](made()), stacked).workers["batch_stats"]
    layer, seen = layer["BatchNorm_0"], stacked["BatchNorm_0"]
    mean, var = (np.asarray(seen[name], np.float64) for name in ("mean", "var"))
    assert layer["var"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(layer["var"][0], np.float64), var.mean(0) + mean.var(0), rtol=4e-3
    )


def test_an_axis_merges_within_its_groups():
    x = data()
    cluster = lsgd.on_mesh(
        made(lsgd.batch_statistics("worker")),
        mesh(pod=2, worker=4),
        axis=("pod", "worker"),
    )
    state = synced(cluster, statistics(x))
    layer = state.workers["batch_stats"]["BatchNorm_0"]
    for pod in range(2):
        joined = x[4 * pod : 4 * pod + 4].reshape(-1, 3)
        np.testing.assert_allclose(layer["var"][4 * pod], joined.var(0), rtol=1e-5)


def test_the_variables_of_nnx_are_found():
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    stats = nnx.state(layer, nnx.BatchStat)
    x = data()
    values = {name: x.mean(1) if name == "mean" else x.var(1) for name in stats}
    for tree in (stats, nnx.as_pure(stats)):
        stacked = jax.tree.map_with_path(
            lambda path, leaf: values[path[0].key].astype(np.float32), tree
        )
        state = synced(lsgd.simulate(made(), WORKERS), stacked)
        merged = jax.tree.leaves(state.workers["batch_stats"])
        np.testing.assert_allclose(merged[1][0], x.reshape(-1, 3).var(0), rtol=1e-5)


def test_other_names():
    x = data()
    stacked = {"running_mean": x.mean(1), "running_var": x.var(1)}
    stacked = jax.tree.map(lambda leaf: leaf.astype(np.float32), stacked)
    rule = lsgd.batch_statistics(mean="running_mean", variance="running_var")
    state = synced(lsgd.simulate(made(rule), WORKERS), stacked)
    merged = state.workers["batch_stats"]["running_var"][0]
    np.testing.assert_allclose(merged, x.reshape(-1, 3).var(0), rtol=1e-5)


def test_statistics_are_estimated_anew():
    """A linen BatchNorm behind a layer, from two batches to those of the union."""

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(4)(x)
            return linen.BatchNorm(use_running_average=False, momentum=0.9)(x)

    model, x = Model(), data()[:2].astype(np.float32)
    variables = model.init(jax.random.key(0), x[0])

    def update(statistics, batch):
        known = {"params": variables["params"], "batch_stats": statistics}
        return model.apply(known, batch, mutable="batch_stats")[1]["batch_stats"]

    found = lsgd.reestimate(update, variables["batch_stats"], list(x))
    kernel = np.asarray(variables["params"]["Dense_0"]["kernel"], np.float64)
    seen = x.astype(np.float64).reshape(-1, 3) @ kernel
    layer = found["BatchNorm_0"]
    np.testing.assert_allclose(layer["mean"], seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(layer["var"], seen.var(0), rtol=1e-4)


@pytest.mark.parametrize(
    "tree, error, message",
    [
        ({"a": {"mu": 1.0}}, ValueError, r"stand side by side.*\"\['a'\]\['mu'\]\""),
        ({"mean": 1.0, "b": {"var": 1.0}}, ValueError, r"mean='mean', variance='var'"),
        ({"mean": jnp.int32(1), "var": 1.0}, TypeError, r"batch_statistics\(.*int32"),
    ],
)
def test_bad_input(tree, error, message):
    with pytest.raises(error, match=message):
        lsgd.simulate(made(), 2).init({"batch_stats": tree})


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="at least one batch is needed, got none"):
        lsgd.reestimate(lambda s, b: s, {"mean": jnp.zeros(2)}, [])
