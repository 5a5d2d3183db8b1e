"""Merged batch statistics against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from harness.cases import PLACEMENTS, WORKERS, assert_close, assert_same, mesh
from harness.selection import in_full, keep

import localsgd_jax as lsgd

WEIGHTS = np.array([1, 2, 0, 0.5, 3, 1, 0, 2], np.float32)


def data(n=20, d=3, seed=0):
    """Returns data with a different mean for each worker, (K, n, d)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(WORKERS, n, d)) * 2 + 5 * rng.normal(size=(WORKERS, 1, d))


def statistics(x, dtype=np.float32):
    """Returns the statistics of each worker, nested as in Flax Linen."""
    layer = {"mean": x.mean(1).astype(dtype), "var": x.var(1).astype(dtype)}
    return {"BatchNorm_0": layer, "deeper": {"BatchNorm_1": dict(layer)}}


def sync_statistics(cluster, stacked, weight=None, rounds=1):
    """Returns the state after synchronisations without local steps."""
    one = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), stacked)
    state = cluster.init({"batch_stats": one})
    state = state._replace(workers={"batch_stats": stacked})
    for _ in range(rounds):
        state = cluster.sync(state, weight)
    return state


def merging_algorithm(rule=None):
    return lsgd.from_train_step(
        lambda state, batch: (state, batch),
        {"batch_stats": rule or lsgd.merge_batch_stats()},
    )


@pytest.mark.parametrize(
    "placement", keep(["simulate", "mesh", "lanes", "sharded"], ["lanes"])
)
def test_merged_variance_is_that_of_the_union(placement):
    x = data()
    state = sync_statistics(PLACEMENTS[placement](merging_algorithm()), statistics(x))
    joined = x.reshape(-1, x.shape[-1])
    for layer in (
        state.workers["batch_stats"]["BatchNorm_0"],
        state.workers["batch_stats"]["deeper"]["BatchNorm_1"],
    ):
        for k in range(WORKERS):
            np.testing.assert_allclose(layer["mean"][k], joined.mean(0), rtol=1e-5)
            np.testing.assert_allclose(layer["var"][k], joined.var(0), rtol=1e-5)


@pytest.mark.parametrize("placement", [in_full("simulate"), "lanes"])
def test_weights_as_example_counts(placement):
    """Weight n equals n copies of the data; weight 0 also masks a NaN."""
    x, copies = data(), np.array([1, 2, 0, 1, 3, 1, 0, 2])
    stacked = statistics(x)
    stacked["BatchNorm_0"]["var"][2] = np.nan
    state = sync_statistics(
        PLACEMENTS[placement](merging_algorithm()), stacked, copies.astype(np.float32)
    )
    joined = np.repeat(x, copies, axis=0).reshape(-1, x.shape[-1])
    layer = state.workers["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(layer["mean"][2], joined.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer["var"][2], joined.var(0), rtol=1e-5)


def test_merged_statistics_are_unchanged_by_further_rounds():
    """The variance of the means is added only once."""
    cluster = PLACEMENTS["mesh"](merging_algorithm())
    once = sync_statistics(cluster, statistics(data()))
    twice = sync_statistics(cluster, statistics(data()), rounds=3)
    assert_close(twice.workers, once.workers)


def test_large_means_do_not_cancel_after_the_first_merge():
    """Near 10 000, squares in float32 cannot represent a variance of 1."""
    cluster = PLACEMENTS["simulate"](merging_algorithm())
    start = 10_000 + data(seed=1)
    state = sync_statistics(cluster, statistics(start))
    later = 10_000 + data(seed=2) / 10
    state = cluster.sync(state._replace(workers={"batch_stats": statistics(later)}))
    seen = statistics(later)["BatchNorm_0"]
    mean, var = (np.asarray(seen[name], np.float64) for name in ("mean", "var"))
    layer = state.workers["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(layer["var"][0], var.mean(0) + mean.var(0), rtol=1e-4)


@pytest.mark.parametrize("placement", ["simulate", "lanes"])
def test_all_zero_weights_is_identity(placement):
    cluster = PLACEMENTS[placement](merging_algorithm())
    state = sync_statistics(cluster, statistics(data()))
    state = state._replace(workers={"batch_stats": statistics(data(seed=4))})
    after = cluster.sync(state, np.zeros(WORKERS))
    assert_same(after._replace(round=state.round), state)


@pytest.mark.parametrize("weight", [None, WEIGHTS], ids=["equal", "weighted"])
def test_other_leaves_are_averaged(weight):
    rows = np.arange(16, dtype=np.float32).reshape(8, 2)
    stacked = statistics(data()) | {"scale": rows, "unpaired": {"mean": rows}}
    state = sync_statistics(PLACEMENTS["mesh"](merging_algorithm()), stacked, weight)
    expected = np.average(rows, axis=0, weights=weight)
    for leaf in (
        state.workers["batch_stats"]["scale"],
        state.workers["batch_stats"]["unpaired"]["mean"],
    ):
        np.testing.assert_allclose(leaf[5], expected, rtol=1e-6)


def test_half_precision_statistics_are_merged_in_float32():
    stacked = statistics(data(), jnp.bfloat16)
    layer = sync_statistics(
        PLACEMENTS["simulate"](merging_algorithm()), stacked
    ).workers["batch_stats"]
    layer, seen = layer["BatchNorm_0"], stacked["BatchNorm_0"]
    mean, var = (np.asarray(seen[name], np.float64) for name in ("mean", "var"))
    assert layer["var"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(layer["var"][0], np.float64), var.mean(0) + mean.var(0), rtol=4e-3
    )


def test_axis_merges_within_groups():
    x = data()
    cluster = lsgd.on_mesh(
        merging_algorithm(lsgd.merge_batch_stats("worker")),
        mesh(pod=2, worker=4),
        axis=("pod", "worker"),
    )
    state = sync_statistics(cluster, statistics(x))
    layer = state.workers["batch_stats"]["BatchNorm_0"]
    for pod in range(2):
        joined = x[4 * pod : 4 * pod + 4].reshape(-1, 3)
        np.testing.assert_allclose(layer["var"][4 * pod], joined.var(0), rtol=1e-5)


def test_nnx_variables_are_found():
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    stats = nnx.state(layer, nnx.BatchStat)
    x = data()
    values = {name: x.mean(1) if name == "mean" else x.var(1) for name in stats}
    for tree in (stats, nnx.as_pure(stats)):
        stacked = jax.tree.map_with_path(
            lambda path, leaf: values[path[0].key].astype(np.float32), tree
        )
        state = sync_statistics(lsgd.simulate(merging_algorithm(), WORKERS), stacked)
        merged = jax.tree.leaves(state.workers["batch_stats"])
        np.testing.assert_allclose(merged[1][0], x.reshape(-1, 3).var(0), rtol=1e-5)


def test_custom_leaf_names():
    x = data()
    stacked = {"running_mean": x.mean(1), "running_var": x.var(1)}
    stacked = jax.tree.map(lambda leaf: leaf.astype(np.float32), stacked)
    rule = lsgd.merge_batch_stats(mean="running_mean", variance="running_var")
    state = sync_statistics(lsgd.simulate(merging_algorithm(rule), WORKERS), stacked)
    merged = state.workers["batch_stats"]["running_var"][0]
    np.testing.assert_allclose(merged, x.reshape(-1, 3).var(0), rtol=1e-5)


def test_recomputed_statistics_are_those_of_the_union():
    """Uses a Linen BatchNorm after a dense layer and two batches."""

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

    found = lsgd.recompute_batch_stats(update, variables["batch_stats"], list(x))
    kernel = np.asarray(variables["params"]["Dense_0"]["kernel"], np.float64)
    seen = x.astype(np.float64).reshape(-1, 3) @ kernel
    layer = found["BatchNorm_0"]
    np.testing.assert_allclose(layer["mean"], seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(layer["var"], seen.var(0), rtol=1e-4)


@pytest.mark.parametrize(
    "tree, error, message",
    [
        (
            {"a": {"mu": 1.0}},
            ValueError,
            r"must be siblings in the tree.*\"\['a'\]\['mu'\]\"",
        ),
        ({"mean": 1.0, "b": {"var": 1.0}}, ValueError, r"mean='mean', variance='var'"),
        ({"mean": jnp.int32(1), "var": 1.0}, TypeError, r"merge_batch_stats\(.*int32"),
    ],
)
def test_invalid_statistics_raise(tree, error, message):
    with pytest.raises(error, match=message):
        lsgd.simulate(merging_algorithm(), 2).init({"batch_stats": tree})


def test_no_batches_raise():
    with pytest.raises(ValueError, match="at least one batch is required, got none"):
        lsgd.recompute_batch_stats(lambda s, b: s, {"mean": jnp.zeros(2)}, [])
