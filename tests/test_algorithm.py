"""One worker's algorithm: losses, train states of all kinds, and what is refused."""

import collections
import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import algorithm, assert_close, batches, cluster, mesh, network

import localsgd_jax as lsgd


def made(loss_fn, **options):
    return lsgd.local_sgd(loss_fn, optax.sgd(0.5), rule=lsgd.average(), **options)


def test_auxiliary_output_comes_back_per_worker():
    def loss_fn(w, batch):
        return (w - batch) ** 2, {"twice": 2 * batch}

    verbs = lsgd.simulate(made(loss_fn, has_aux=True), 3)
    _, metrics = verbs.step(verbs.init(0.0), np.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(metrics["loss"], [1, 4, 9])
    np.testing.assert_array_equal(metrics["aux"]["twice"], [2, 4, 6])


def test_a_dict_of_rules_may_share_the_moments():
    rules = {"params": lsgd.average(), "opt_state": lsgd.keep()}
    optimizer = optax.sgd(0.1, momentum=0.9)
    kept = lsgd.simulate(algorithm(rules, optimizer), 8)
    shared = lsgd.simulate(
        algorithm(rules | {"opt_state": lsgd.average()}, optimizer), 8
    )
    for verbs, equal in ((kept, False), (shared, True)):
        state, _ = verbs.step(verbs.init(network()), batches(1)[0])
        trace = verbs.sync(state).workers.opt_state[0].trace["out"]
        assert np.allclose(trace, trace[0][None]) is equal


class Named(NamedTuple):
    params: jax.Array
    seen: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plain:
    params: jax.Array
    seen: jax.Array


@chex.dataclass(frozen=True)
class Checked:
    params: jax.Array
    seen: jax.Array


@pytest.mark.parametrize("kind", [Named, Plain, Checked, dict, collections.OrderedDict])
def test_train_states_of_every_kind(kind):
    def train_step(state, batch):
        read = (
            state.get if isinstance(state, dict) else lambda name: getattr(state, name)
        )
        return kind(params=read("params") + batch, seen=read("seen") + 1), batch

    verbs = lsgd.simulate(lsgd.from_train_step(train_step, lsgd.average()), 2)
    state = verbs.init(kind(params=jnp.zeros(()), seen=jnp.int32(0)))
    state, metrics = verbs.step(state, jnp.array([1.0, 3.0]))
    synced = verbs.sync(state).workers
    params, seen = jax.tree.leaves(synced)
    assert type(synced) is kind
    assert (params.tolist(), seen.tolist(), metrics.tolist()) == (
        [2, 2],
        [1, 1],
        [1, 3],
    )
    assert lsgd.consensus(state) == 2


def test_a_flax_train_state():
    from flax import linen as nn
    from flax.training.train_state import TrainState

    model = nn.Dense(1)
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))

    def train_step(state, batch):
        loss = lambda p: jnp.mean(state.apply_fn(p, batch) ** 2)  # noqa: E731
        value, grad = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grad), {"loss": value}

    train_state = TrainState.create(
        apply_fn=model.apply, params=params, tx=optax.adam(0.1)
    )
    verbs = lsgd.on_mesh(
        lsgd.from_train_step(train_step, lsgd.average()), mesh(worker=4)
    )
    batch = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    state, _ = verbs.step(verbs.init(train_state), batch)
    kernel = verbs.sync(state).workers.params["params"]["kernel"]
    alone = [train_step(train_state, batch[k])[0].params for k in range(4)]
    expected = np.mean([p["params"]["kernel"] for p in alone], axis=0)
    np.testing.assert_allclose(kernel, np.stack([expected] * 4), rtol=1e-5)


def test_every_worker_gets_a_key_of_its_own():
    def train_step(state, batch):
        key, own = jax.random.split(state["key"])
        return {"params": state["params"], "key": key}, jax.random.normal(own)

    draws = {}
    for place in ("simulate", "mesh", "lanes"):
        rule = lsgd.from_train_step(train_step, lsgd.average())
        verbs = {
            "simulate": lambda rule=rule: lsgd.simulate(rule, 8),
            "mesh": lambda rule=rule: lsgd.on_mesh(rule, mesh(worker=8)),
            "lanes": lambda rule=rule: lsgd.on_mesh(rule, mesh(worker=2), workers=8),
        }[place]()
        state = verbs.init({"params": jnp.zeros(2), "key": jax.random.key(7)})
        _, first = verbs.step(state, np.zeros(8, np.float32))
        draws[place] = np.asarray(first)
        assert len(set(draws[place].tolist())) == 8
    np.testing.assert_array_equal(draws["simulate"], draws["mesh"])
    np.testing.assert_array_equal(draws["simulate"], draws["lanes"])


def test_every_key_of_an_array_of_keys_becomes_another():
    made = lsgd.from_train_step(lambda state, batch: (state, batch), lsgd.keep())
    keys = jax.random.split(jax.random.key(0), 3)
    state = lsgd.simulate(made, 4).init({"params": jnp.zeros(2), "keys": keys})
    assert state.workers["keys"].shape == (4, 3)
    raw = np.asarray(jax.random.key_data(state.workers["keys"])).reshape(12, -1)
    assert len({tuple(row) for row in raw.tolist()}) == 12


def test_complex_parameters_have_a_mean():
    made = lsgd.from_train_step(lambda state, batch: (state, batch), lsgd.average())
    verbs = lsgd.simulate(made, 2)
    state = verbs.init({"params": jnp.zeros((), jnp.complex64)})
    state.workers["params"] = jnp.array([1 + 2j, 3 - 6j], jnp.complex64)
    assert verbs.sync(state).workers["params"].tolist() == [2 - 2j, 2 - 2j]


def test_consensus_is_the_mean_in_float32_and_keeps_what_has_none():
    params = {"w": jnp.zeros(3, jnp.bfloat16), "n": jnp.int32(5)}
    verbs = lsgd.simulate(
        lsgd.from_train_step(lambda s, b: (s, b), {"w": lsgd.average()}), 8
    )
    state = verbs.init({"w": params["w"], "params": params})
    rows = jnp.array([256.0] + [1.0] * 7, jnp.bfloat16)[:, None] * jnp.ones((1, 3))
    state.workers["params"]["w"] = rows.astype(jnp.bfloat16)
    state.workers["params"]["n"] = jnp.arange(5, 13)
    mean = lsgd.consensus(state)
    assert mean["n"] == 5 and mean["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(mean["w"], jnp.full(3, 32.875, jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("place", ["simulate", "mesh", "lanes"])
@pytest.mark.parametrize("weight", [None, np.ones(8)], ids=["equal", "weighted"])
def test_half_precision_means_are_accumulated_in_float32(dtype, place, weight):
    """256 + 1 is 256 in bfloat16: summed there, the mean of these is 32, not 32.875."""
    verbs = cluster(place, "average")
    state = verbs.init(jax.tree.map(lambda x: jnp.asarray(x, dtype), network()))
    column = jnp.array([256.0] + [1.0] * 7, dtype)
    state = state._replace(
        workers=state.workers._replace(
            params=jax.tree.map(
                lambda x: jnp.broadcast_to(
                    column.reshape(8, *[1] * (x.ndim - 1)), x.shape
                ),
                state.workers.params,
            )
        )
    )
    mean = verbs.sync(state, weight).workers.params["out"]
    assert mean.dtype == dtype
    np.testing.assert_array_equal(mean, jnp.full_like(mean, jnp.asarray(32.875, dtype)))


def test_a_user_may_name_no_rule_but_one():
    with pytest.raises(TypeError, match=r"a SyncRule is needed, such as average\(\)"):
        lsgd.local_sgd(lambda w, b: w, optax.sgd(0.1), rule=lsgd.average)


def grow(state, batch):
    return {**state, "new": batch}, batch


def widen(state, batch):
    return {"params": jnp.zeros((2, 3)), "n": state["n"]}, batch


def count_in_floats(state, batch):
    return {"params": state["params"], "n": state["n"] + 0.5}, batch


@pytest.mark.parametrize(
    "train_step, message",
    [
        (grow, r"keep its structure.*differ at \[\"\['new'\]\"\]"),
        (widen, r"got float32\[2, 3\] from float32\[2\] at \['params'\]"),
        (count_in_floats, r"got float32\[\] from int32\[\] at \['n'\]"),
    ],
)
def test_a_state_that_changes_is_refused(train_step, message):
    verbs = lsgd.simulate(lsgd.from_train_step(train_step, lsgd.average()), 2)
    state = verbs.init({"params": jnp.zeros(2), "n": jnp.int32(0)})
    with pytest.raises(TypeError, match=message):
        verbs.step(state, jnp.zeros(2))


STATE = {"params": jnp.zeros(2), "n": jnp.int32(0), "key": jax.random.key(0)}


def init(rule, state=STATE):
    return lsgd.simulate(lsgd.from_train_step(lambda s, b: (s, b), rule), 2).init(state)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: init({"weights": lsgd.average()}),
            ValueError,
            r"field 'weights'.*no such field; it has \['params', 'n', 'key'\]",
        ),
        (
            lambda: init({"n": lsgd.average()}),
            TypeError,
            r"field 'n': average\(\): every leaf.*got int32 at the root",
        ),
        (
            lambda: init({"key": lsgd.average()}),
            TypeError,
            r"field 'key'.*got key<fry>",
        ),
        (
            lambda: init(lsgd.average(), [1.0]),
            TypeError,
            "NamedTuple.*or a dict, got list",
        ),
        (lambda: init({"params": 3}), TypeError, "field 'params': a SyncRule.*got 3"),
        (lambda: made(3), TypeError, r"loss_fn must be callable, got 3"),
        (
            lambda: lsgd.local_sgd(lambda w, b: w, 0.1, rule=lsgd.average()),
            TypeError,
            r"an optax optimizer is needed.*got 0.1",
        ),
        (
            lambda: lsgd.from_train_step(3, lsgd.average()),
            TypeError,
            "callable, got 3",
        ),
        (lambda: lsgd.chain(), ValueError, "at least one rule is needed, got none"),
        (lambda: lsgd.chain(lsgd.average), TypeError, "a SyncRule is needed"),
        (lambda: lsgd.when(4, lsgd.average()), TypeError, "no schedule, got 4"),
        (lambda: lsgd.when(lsgd.every(4), 4), TypeError, "a SyncRule is needed"),
        (lambda: lsgd.gated(None, 4), TypeError, r"no schedule, got 4"),
        (lambda: lsgd.consensus(init(lsgd.average()), "w"), ValueError, "field 'w'"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "loss_fn, message",
    [
        (lambda w, b: (w - b) * jnp.ones(3), r"got float32 of shape \(3,\)"),
        (lambda w, b: jnp.int32(1), r"got int32 of shape \(\)"),
        (lambda w, b: (w - b, 1), r"got a tuple; for \(loss, aux\) pass has_aux=True"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(loss_fn, message):
    verbs = lsgd.simulate(made(loss_fn), 2)
    with pytest.raises(TypeError, match=message):
        verbs.step(verbs.init(0.0), jnp.zeros(2))


def rule_that(apply):
    return lsgd.SyncRule(lambda tree: lsgd.RuleState(), apply)


@pytest.mark.parametrize(
    "rule, message",
    [
        (rule_that(lambda tree, state, context: tree), r"it must return \(tree, Rule"),
        (
            rule_that(lambda t, state, context: (t.astype(jnp.float16), state)),
            r"field 'params': the tree must keep.*float16\[2\] from float32\[2\]",
        ),
        (
            rule_that(lambda tree, state, context: (tree, lsgd.RuleState(own=tree))),
            "the RuleState must keep its structure",
        ),
    ],
)
def test_a_rule_that_breaks_its_promise_is_refused(rule, message):
    verbs = lsgd.simulate(lsgd.from_train_step(lambda s, b: (s, b), rule), 2)
    with pytest.raises(TypeError, match=message):
        verbs.sync(verbs.init(STATE))


def test_a_rule_without_a_state_is_refused():
    rule = lsgd.SyncRule(lambda tree: None, lambda tree, state, context: (tree, state))
    with pytest.raises(TypeError, match="'params': init must return a RuleState"):
        init(rule)


def test_a_train_step_that_returns_no_pair_is_refused():
    verbs = lsgd.simulate(lsgd.from_train_step(lambda s, b: s, lsgd.keep()), 2)
    with pytest.raises(TypeError, match=r"it must return \(train_state, metrics\)"):
        verbs.step(verbs.init(STATE), jnp.zeros(2))


def test_python_numbers_are_parameters_too():
    verbs = lsgd.simulate(made(lambda p, b: (p["w"] - b) ** 2), 2)
    state, _ = verbs.step(verbs.init({"w": 0.0}), np.array([1.0, 3.0]))
    assert_close(verbs.sync(state).workers.params, {"w": np.full(2, 2.0, np.float32)})
