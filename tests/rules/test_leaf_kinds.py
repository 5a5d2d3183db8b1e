"""Every rule on empty leaves, Python floats, complex leaves and empty trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import RULES, WORKERS, mesh
from harness.selection import in_full

import localsgd_jax as lsgd

BARE_RULES = {
    "median": lsgd.median(),
    "trimmed_mean": lsgd.trimmed_mean(0.25),
    "quantize": lsgd.quantize(lsgd.average(), 4),
    "top_k": lsgd.top_k(lsgd.average(), 0.3),
    "scaled_sign": lsgd.scaled_sign(lsgd.average()),
    "fragment_of_slices": lsgd.fragment(lsgd.average(), 3, split_axis=0),
}
# Rules for trees with given labels or fields, which have tests of their own.
SPECIAL = {"partition", "control_variates"}
ALL_RULES = BARE_RULES | {
    name: case.rule for name, case in RULES.items() if name not in SPECIAL
}
FLOATING_ONLY = {
    *("quantize_8", "quantize_1", "cast", "top_k", "scaled_sign", "median"),
    *("trimmed_mean", "quantize", "chunked_top_k", "quantize_e3m0"),
}
# The others are in the selection `full`.
FAST = {"average", "quantize_8", "drop_outliers", "fragment"}
PLACEMENTS = {
    "simulate": lambda algorithm: lsgd.simulate(algorithm, WORKERS),
    "lanes": lambda algorithm: lsgd.on_mesh(algorithm, mesh(worker=4), WORKERS),
    "sharded": lambda algorithm: lsgd.on_mesh(
        algorithm, mesh(worker=4, model=2), WORKERS
    ),
}
parametrize_rules = pytest.mark.parametrize(
    "name", [name if name in FAST else in_full(name) for name in ALL_RULES]
)
parametrize_placements = pytest.mark.parametrize(
    "placement", [name if name == "simulate" else in_full(name) for name in PLACEMENTS]
)


def set_to_batch(state, batch):
    """Replaces the parameters by the batch: a rule on given trees."""
    return {"params": batch}, {}


def synchronise(rule, tree, placement, rounds=3):
    """Runs rounds on trees that differ between workers, and returns the last."""
    algorithm = lsgd.from_train_step(set_to_batch, rule)
    cluster = PLACEMENTS[placement](algorithm)
    state = cluster.init({"params": tree})
    start = jax.tree.map(lambda x: x[0], state.workers)["params"]
    random = np.random.default_rng(0)

    def rows(x):
        noise = random.normal(size=(WORKERS, *x.shape))
        if jnp.iscomplexobj(x):
            noise = noise + 1j * random.normal(size=noise.shape)
        return np.asarray(np.asarray(x)[None] + noise, x.dtype)

    for _ in range(rounds):
        batch = jax.tree.map(rows, start)
        state, _ = cluster.step(state, cluster.shard_batch(batch))
        before = state.workers["params"]
        state = cluster.sync(state)
    return before, state


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(np.asarray(leaf, np.complex64)).all()


@parametrize_placements
@parametrize_rules
def test_leaves_of_size_zero(name, placement):
    rest = {"b": jnp.ones(5), "c": jnp.ones((2, 3)), "d": jnp.ones(4)}
    tree = {"a": jnp.zeros((0, 3)), **rest}
    before, state = synchronise(ALL_RULES[name], tree, placement)
    assert state.workers["params"]["a"].shape == (WORKERS, 0, 3)
    assert_finite(state)


def test_a_tree_of_size_zero():
    rule = lsgd.chunked_top_k(lsgd.average(), 2, chunk=4)
    cluster = lsgd.simulate(lsgd.from_train_step(lambda s, b: s, rule), workers=2)
    state = cluster.sync(cluster.init({"params": {"a": jnp.zeros((0, 3))}}))
    assert state.workers["params"]["a"].shape == (2, 0, 3)


@parametrize_placements
@parametrize_rules
def test_python_floats(name, placement):
    tree = {"a": 1.5, "b": 2.0, "c": 0.5, "d": 1.0}
    _, state = synchronise(ALL_RULES[name], tree, placement)
    assert state.workers["params"]["a"].shape == (WORKERS,)
    assert_finite(state)


@parametrize_placements
@parametrize_rules
def test_empty_tree(name, placement):
    if "fragment" in name:
        pytest.raises(ValueError, synchronise, ALL_RULES[name], {}, placement)
        return
    rule = {"params": ALL_RULES[name], "bias": lsgd.average()}

    def step(state, batch):
        return {**state, "bias": batch}, {}

    cluster = PLACEMENTS[placement](lsgd.from_train_step(step, rule))
    state = cluster.init({"params": {}, "bias": jnp.zeros(())})
    state, _ = cluster.step(state, np.arange(WORKERS, dtype="f4"))
    for weight in (None, np.ones(WORKERS)):
        synced = cluster.sync(state, weight)
        np.testing.assert_allclose(synced.workers["bias"], 3.5)
        assert_finite(synced)


@parametrize_placements
@parametrize_rules
def test_complex_leaves(name, placement):
    """Linear rules treat real and imaginary parts alike; the others raise at init."""
    tree = {"a": jnp.ones(3, jnp.complex64), "b": jnp.ones(4), "c": jnp.ones(2)}
    if name in FLOATING_ONLY:
        with pytest.raises(TypeError, match=r"must be floating point, got complex64"):
            synchronise(ALL_RULES[name], tree, placement)
        return
    before, state = synchronise(ALL_RULES[name], tree, placement)
    assert state.workers["params"]["a"].dtype == jnp.complex64
    assert_finite(state)
    if name == "average":
        mean = np.asarray(before["a"]).mean(0)
        np.testing.assert_allclose(state.workers["params"]["a"][0], mean, rtol=1e-5)


def test_diagnostics_of_complex_leaves_equal_those_of_two_real_leaves():
    def metrics(tree):
        rule = lsgd.with_diagnostics(lsgd.slowmo())
        cluster = lsgd.simulate(lsgd.from_train_step(set_to_batch, rule), 2)
        state = cluster.init({"params": jax.tree.map(lambda x: 0 * x[0], tree)})
        for _ in range(2):
            state, _ = cluster.step(state, tree)
            state = cluster.sync(state)
        return state.shared["params"][1].scalars

    z = jnp.array([[1 + 2j, 3j], [-1 + 1j, 2]])
    expected = metrics(jnp.concatenate([z.real, z.imag], axis=1))
    found = metrics(z)
    for key in ("consensus_distance", "delta_norm", "cosine", "momentum_cosine"):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-5)


@pytest.mark.parametrize("leaf", [jnp.ones(2, jnp.complex64)], ids=["complex64"])
def test_merge_batch_stats_raises_for_complex_leaves(leaf):
    with pytest.raises(TypeError, match="must be floating point, got complex64"):
        lsgd.merge_batch_stats().init({"mean": leaf, "var": jnp.ones(2)})


@pytest.mark.parametrize("placement", [*PLACEMENTS])
def test_batches_of_size_zero(placement):
    """The optional part of a batch may be empty."""

    def loss(params, batch):
        return jnp.sum((params - batch["x"]) ** 2) + jnp.sum(batch["extra"])

    made = lsgd.local_sgd(loss, optax.sgd(0.1), lsgd.average())
    cluster = PLACEMENTS[placement](made)
    batch = {"x": np.ones((WORKERS, 2), "f4"), "extra": np.zeros((WORKERS, 0, 3), "f4")}
    state, history = lsgd.train(
        cluster, cluster.init(jnp.zeros(2)), [batch] * 4, schedule=2, progress=False
    )
    assert history["step"].tolist() == [2, 4] and np.isfinite(history["loss"]).all()
