"""Rules by label or path, and separate periods for the moments of Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import (
    WORKERS,
    algorithm,
    assert_close,
    assert_same,
    batches,
    network,
    run_manually,
)
from harness.rule_arrays import sync_tree

import localsgd_jax as lsgd
from localsgd_jax.flax import from_linen, from_nnx

ADAM = optax.adam(0.05)


def by_layer(path):
    return path.split(".")[0]


def test_one_label_is_its_rule():
    rule = lsgd.partition({"all": lsgd.diloco()}, lambda path: "all")
    state, _ = run_manually(
        lsgd.simulate(algorithm(rule), WORKERS), batches(4), lsgd.every(2)
    )
    expected, _ = run_manually(
        lsgd.simulate(algorithm(lsgd.diloco()), WORKERS), batches(4), lsgd.every(2)
    )
    assert_same(state.workers, expected.workers)


@pytest.mark.parametrize(
    "labels", [by_layer, {"in": "in", "out": "out"}], ids=["function", "tree"]
)
@pytest.mark.parametrize("weight", [None, np.array([1, 2, 0, 1, 3, 1, 0, 2.0])])
def test_each_leaf_follows_its_rule(labels, weight):
    """An outer rule on one layer, and private leaves; NumPy in float64."""
    rules = {"in": lsgd.outer(optax.sgd(0.5)), "out": lsgd.identity()}
    cluster = lsgd.simulate(algorithm(lsgd.partition(rules, labels)), WORKERS)
    state, _ = run_manually(cluster, batches(3), lsgd.never())
    after = cluster.sync(state, weight).workers.params
    assert_same(after["out"], state.workers.params["out"])
    for name, start in network()["in"].items():
        rows = np.asarray(state.workers.params["in"][name], np.float64)
        mean = np.average(rows, axis=0, weights=weight)
        expected = start + 0.5 * (mean - start)
        np.testing.assert_allclose(after["in"][name], [expected] * 8, rtol=1e-5)


def moments_are_equal(state):
    adam = state.workers.opt_state[0]
    return [bool(np.ptp(x["out"], axis=0).max() == 0) for x in (adam.mu, adam.nu)]


def test_desloc_synchronises_each_moment_in_its_own_rounds():
    """Algorithm 1 with periods 1, 3 and 6, against NumPy in float64."""
    cluster = lsgd.simulate(algorithm(lsgd.desloc(), ADAM), WORKERS)
    state = cluster.init(network())
    counts = jnp.arange(WORKERS, dtype=jnp.int32)
    adam = state.workers.opt_state[0]._replace(count=counts)
    workers = state.workers._replace(opt_state=(adam, *state.workers.opt_state[1:]))
    state = state._replace(workers=workers)
    for r, batch in enumerate(batches(6), 1):
        state, _ = cluster.step(state, batch)
        before, state = state, cluster.sync(state)
        assert moments_are_equal(state) == [r % 3 == 0, r % 6 == 0]
        assert np.ptp(state.workers.params["out"], axis=0).max() == 0
        if r == 3:
            rows = np.asarray(before.workers.opt_state[0].mu["out"], np.float64)
            found = state.workers.opt_state[0].mu["out"]
            np.testing.assert_allclose(found, [rows.mean(0)] * WORKERS, rtol=1e-5)
    np.testing.assert_array_equal(state.workers.opt_state[0].count, counts + 6)


def test_desloc_with_equal_periods_is_local_adam():
    rules = {"params": lsgd.average(), "opt_state": lsgd.floating_only(lsgd.average())}
    states = [
        run_manually(
            lsgd.simulate(algorithm(rule, ADAM), WORKERS), batches(4), lsgd.every(2)
        )[0]
        for rule in (lsgd.desloc(first_moment=1, second_moment=1), rules)
    ]
    assert_same(states[0].workers, states[1].workers)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_adapters_only_with_a_plain_tree(scale):
    """LoRA: the frozen matrix sends nothing, the adapters are averaged."""
    labels = lambda path: "adapter" if path in ("a", "b") else "frozen"  # noqa: E731
    rule = lsgd.partition(
        {"adapter": lsgd.average(), "frozen": lsgd.identity()}, labels
    )
    optimizer = optax.partition(
        {"adapter": optax.sgd(0.1), "frozen": optax.set_to_zero()},
        {"a": "adapter", "b": "adapter", "w": "frozen"},
    )

    def loss(params, x):
        return jnp.mean((x @ (params["w"] + scale * params["a"] @ params["b"])) ** 2)

    cluster = lsgd.simulate(lsgd.local_sgd(loss, optimizer, rule), 2)
    start = {"w": jnp.eye(4), "a": jnp.ones((4, 1)), "b": jnp.ones((1, 4))}
    state = cluster.init(start)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    state, _ = cluster.step(state, x)
    after = cluster.sync(state).workers.params
    assert_close(after["w"], jnp.stack([start["w"]] * 2))
    for name in "ab":
        mean = np.asarray(state.workers.params[name]).mean(0)
        np.testing.assert_allclose(after[name], [mean] * 2, rtol=1e-6)
    assert cluster.bytes_sent(state)[1] == 2 * 4 * 4


def train_flax(algorithm, start, params):
    """Returns the parameters of two workers after a step and a synchronisation."""
    cluster = lsgd.simulate(algorithm, 2)
    x = np.random.default_rng(0).integers(0, 5, size=(2, 3))
    state, _ = cluster.step(cluster.init(start), x)
    before, after = params(state.workers), params(cluster.sync(state).workers)
    return jax.tree.map(np.asarray, before), jax.tree.map(np.asarray, after)


EXCEPT_EMBEDDINGS = lsgd.partition(
    {"embedding": lsgd.identity(), "rest": lsgd.average()},
    lambda path: "embedding" if "embed" in path else "rest",
)


def assert_only_embeddings_differ(before, after):
    for path, leaf in jax.tree.leaves_with_path(after):
        if "embed" in jax.tree_util.keystr(path):
            assert np.ptp(leaf, axis=0).max() > 0
        else:
            assert np.ptp(leaf, axis=0).max() == 0
    assert jax.tree.structure(before) == jax.tree.structure(after)


def test_exceptions_for_embeddings_with_linen():
    from flax import linen as nn
    from flax.training.train_state import TrainState

    model = nn.Sequential([nn.Embed(5, 4, name="embed"), nn.Dense(1)])
    params = model.init(jax.random.key(0), jnp.zeros(3, int))["params"]
    start = TrainState.create(apply_fn=model.apply, params=params, tx=ADAM)

    def step(state, batch):
        loss = lambda p: jnp.mean((state.apply_fn({"params": p}, batch) - 1) ** 2)  # noqa: E731
        return state.apply_gradients(grads=jax.grad(loss)(state.params)), {}

    rules = lsgd.desloc(EXCEPT_EMBEDDINGS)
    made, start = from_linen(step, start, rules)
    assert_only_embeddings_differ(*train_flax(made, start, lambda w: w.params))


def test_exceptions_for_embeddings_with_nnx():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(5, 4, rngs=rngs)
            self.dense = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.dense(self.embed(x))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)

    def step(model, optimizer, batch):
        grads = nnx.grad(lambda m: jnp.mean((m(batch) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return {}

    made, start = from_nnx(step, model, optimizer, rule=lsgd.desloc(EXCEPT_EMBEDDINGS))
    assert_only_embeddings_differ(*train_flax(made, start, lambda w: w.params))


@pytest.mark.parametrize(
    "rules, labels, error, message",
    [
        (
            [lsgd.average()],
            by_layer,
            TypeError,
            r"\(rules\): rules must be a mapping",
        ),
        ({}, by_layer, ValueError, "at least one rule"),
        ({"w": 1}, by_layer, TypeError, r"partition\(rules\['w'\]\)"),
        ({"v": lsgd.average()}, by_layer, ValueError, "the label of 'w' must be one"),
        (
            {"w": lsgd.average(), "v": lsgd.average()},
            by_layer,
            ValueError,
            "a leaf must have the label 'v'",
        ),
    ],
)
def test_invalid_partitions_raise(rules, labels, error, message):
    with pytest.raises(error, match=message):
        sync_tree(lsgd.partition(rules, labels))


def test_invalid_periods_of_desloc_raise():
    with pytest.raises(ValueError, match=r"desloc\(first_moment\)"):
        lsgd.desloc(first_moment=0)
    with pytest.raises(TypeError, match=r"desloc\(second_moment\)"):
        lsgd.desloc(second_moment=1.5)
    with pytest.raises(ValueError, match="a leaf must have the label 'first_moment'"):
        lsgd.simulate(algorithm(lsgd.desloc(), optax.sgd(0.1)), 2).init(network())


def test_labels_that_are_no_prefix_and_mixed_names_raise():
    tree, rules = {"a": jnp.zeros(2), "b": jnp.zeros(2)}, {"x": lsgd.average()}
    with pytest.raises(ValueError, match=r"partition\(labels\): .* prefix .*'a', 'b'"):
        lsgd.partition(rules, {"a": "x"}).init(tree)
    with pytest.raises(ValueError, match=r"one of \[1, 'x'\], got 'z'"):
        lsgd.partition({**rules, 1: lsgd.average()}, lambda path: "z").init(tree)
