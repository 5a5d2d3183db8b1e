"""The algorithm of one worker: losses, train states, rules and invalid arguments."""

import collections
import dataclasses
import re
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import cases
from harness.cases import (
    algorithm,
    assert_close,
    assert_same,
    batches,
    mesh,
    network,
)
from harness.selection import in_full

import localsgd_jax as lsgd


def make_algorithm(loss_fn, **options):
    return lsgd.local_sgd(loss_fn, optax.sgd(0.5), rule=lsgd.average(), **options)


def keep_state(state, batch):
    return state, batch


def test_the_default_rule_is_the_mean():
    def step(state, batch):
        return {"params": state["params"] - batch}, {}

    makers = {
        "local_sgd": lambda: lsgd.local_sgd(lambda w, b: w * b, optax.sgd(1.0)),
        "from_train_step": lambda: lsgd.from_train_step(step),
    }
    for name, make in makers.items():
        made = make()
        assert made.rule_names == {"params": "average()"}, name
        cluster = lsgd.simulate(made, workers=2)
        start = 0.0 if name == "local_sgd" else {"params": 0.0}
        state, _ = cluster.step(cluster.init(start), np.array([1.0, 3.0]))
        assert float(lsgd.consensus(cluster.sync(state))) == -2


def test_auxiliary_output_has_a_row_per_worker():
    def loss_fn(w, batch):
        return (w - batch) ** 2, {"twice": 2 * batch}

    cluster = lsgd.simulate(make_algorithm(loss_fn, has_aux=True), 3)
    _, metrics = cluster.step(cluster.init(0.0), np.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(metrics["loss"], [1, 4, 9])
    np.testing.assert_array_equal(metrics["aux"]["twice"], [2, 4, 6])


def test_a_rule_for_the_optimizer_state_synchronises_moments():
    rules = {"params": lsgd.average(), "opt_state": lsgd.identity()}
    optimizer = optax.sgd(0.1, momentum=0.9)
    local = lsgd.simulate(algorithm(rules, optimizer), 8)
    averaged = lsgd.simulate(
        algorithm(rules | {"opt_state": lsgd.average()}, optimizer), 8
    )
    for cluster, equal in ((local, False), (averaged, True)):
        state, _ = cluster.step(cluster.init(network()), batches(1)[0])
        trace = cluster.sync(state).workers.opt_state[0].trace["out"]
        assert np.allclose(trace, trace[0][None]) is equal


class TupleState(NamedTuple):
    params: jax.Array
    steps: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DataclassState:
    params: jax.Array
    steps: jax.Array


@chex.dataclass(frozen=True)
class ChexState:
    params: jax.Array
    steps: jax.Array


def vars_of(state):
    return {name: getattr(state, name) for name in ("params", "steps")}


@pytest.mark.parametrize(
    "kind", [TupleState, DataclassState, ChexState, dict, collections.OrderedDict]
)
def test_train_state_kinds(kind):
    def train_step(state, batch):
        fields = state if isinstance(state, dict) else vars_of(state)
        return kind(params=fields["params"] + batch, steps=fields["steps"] + 1), batch

    cluster = lsgd.simulate(lsgd.from_train_step(train_step, lsgd.average()), 2)
    state = cluster.init(kind(params=jnp.zeros(()), steps=jnp.int32(0)))
    state, metrics = cluster.step(state, jnp.array([1.0, 3.0]))
    synced = cluster.sync(state).workers
    params, steps = jax.tree.leaves(synced)
    assert type(synced) is kind
    assert (params.tolist(), steps.tolist(), metrics.tolist()) == (
        [2, 2],
        [1, 1],
        [1, 3],
    )
    assert lsgd.consensus(state) == 2


def test_flax_train_state():
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
    cluster = lsgd.on_mesh(
        lsgd.from_train_step(train_step, lsgd.average()), mesh(worker=4)
    )
    batch = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    state, _ = cluster.step(cluster.init(train_state), batch)
    kernel = cluster.sync(state).workers.params["params"]["kernel"]
    stepped = [train_step(train_state, batch[k])[0].params for k in range(4)]
    expected = np.mean([p["params"]["kernel"] for p in stepped], axis=0)
    np.testing.assert_allclose(kernel, np.stack([expected] * 4), rtol=1e-5)


def test_typed_keys_differ_between_workers():
    def train_step(state, batch):
        key, draw_key = jax.random.split(state["key"])
        return {"params": state["params"], "key": key}, jax.random.normal(draw_key)

    draws = {}
    random_draws = lsgd.from_train_step(train_step, lsgd.average())
    for placement, cluster in {
        "simulate": lsgd.simulate(random_draws, 8),
        "mesh": lsgd.on_mesh(random_draws, mesh(worker=8)),
        "lanes": lsgd.on_mesh(random_draws, mesh(worker=2), workers=8),
    }.items():
        state = cluster.init({"params": jnp.zeros(2), "key": jax.random.key(7)})
        _, first = cluster.step(state, np.zeros(8, np.float32))
        draws[placement] = np.asarray(first)
        assert len(set(draws[placement].tolist())) == 8
    np.testing.assert_array_equal(draws["simulate"], draws["mesh"])
    np.testing.assert_array_equal(draws["simulate"], draws["lanes"])


def test_arrays_of_keys_differ_between_workers():
    unchanged = lsgd.from_train_step(keep_state, lsgd.identity())
    keys = jax.random.split(jax.random.key(0), 3)
    state = lsgd.simulate(unchanged, 4).init({"params": jnp.zeros(2), "keys": keys})
    assert state.workers["keys"].shape == (4, 3)
    raw = np.asarray(jax.random.key_data(state.workers["keys"])).reshape(12, -1)
    assert len({tuple(row) for row in raw.tolist()}) == 12


def test_complex_parameters_are_averaged():
    unchanged = lsgd.from_train_step(keep_state, lsgd.average())
    cluster = lsgd.simulate(unchanged, 2)
    state = cluster.init({"params": jnp.zeros((), jnp.complex64)})
    state.workers["params"] = jnp.array([1 + 2j, 3 - 6j], jnp.complex64)
    assert cluster.sync(state).workers["params"].tolist() == [2 - 2j, 2 - 2j]


def test_consensus_averages_in_float32_and_keeps_integers():
    params = {"w": jnp.zeros(3, jnp.bfloat16), "n": jnp.int32(5)}
    cluster = lsgd.simulate(lsgd.from_train_step(keep_state, {"w": lsgd.average()}), 8)
    state = cluster.init({"w": params["w"], "params": params})
    rows = jnp.array([256.0] + [1.0] * 7, jnp.bfloat16)[:, None] * jnp.ones((1, 3))
    state.workers["params"]["w"] = rows.astype(jnp.bfloat16)
    state.workers["params"]["n"] = jnp.arange(5, 13)
    mean = lsgd.consensus(state)
    assert mean["n"] == 5 and mean["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(mean["w"], jnp.full(3, 32.875, jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, in_full(jnp.float16)])
@pytest.mark.parametrize("placement", ["simulate", in_full("mesh"), "lanes"])
@pytest.mark.parametrize("weight", [None, np.ones(8)], ids=["equal", "weighted"])
def test_half_precision_means_are_accumulated_in_float32(dtype, placement, weight):
    """256 + 1 is 256 in bfloat16, so a mean in bfloat16 is 32 instead of 32.875."""
    cluster = cases.cluster(placement, "average")
    state = cluster.init(jax.tree.map(lambda x: jnp.asarray(x, dtype), network()))
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
    mean = cluster.sync(state, weight).workers.params["out"]
    assert mean.dtype == dtype
    np.testing.assert_array_equal(mean, jnp.full_like(mean, jnp.asarray(32.875, dtype)))


@pytest.mark.parametrize("placement", ["simulate", "mesh", "lanes"])
def test_half_precision_is_reduced_in_float32(placement):
    """Tests the traced program: XLA may keep excess precision in the compiled one."""
    cluster = cases.cluster(placement, "average")
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), network())
    program = str(jax.make_jaxpr(cluster.sync)(cluster.init(params)))
    reduced = re.findall(r"(\w+)\[[\d,]*\] = (?:psum|dot_general)\b", program)
    assert set(reduced) == {"f32"}


def test_a_function_instead_of_a_rule_raises():
    with pytest.raises(TypeError, match=r"a SyncRule is needed, such as average\(\)"):
        lsgd.local_sgd(lambda w, b: w, optax.sgd(0.1), rule=lsgd.average)


def add_field(state, batch):
    return {**state, "new": batch}, batch


def change_shape(state, batch):
    return {"params": jnp.zeros((2, 3)), "n": state["n"]}, batch


def change_dtype(state, batch):
    return {"params": state["params"], "n": state["n"] + 0.5}, batch


@pytest.mark.parametrize(
    "train_step, message",
    [
        (add_field, r"keep its structure.*differ at \[\"\['new'\]\"\]"),
        (change_shape, r"got float32\[2, 3\] from float32\[2\] at \['params'\]"),
        (change_dtype, r"got float32\[\] from int32\[\] at \['n'\]"),
    ],
)
def test_train_step_that_changes_the_state_structure_raises(train_step, message):
    cluster = lsgd.simulate(lsgd.from_train_step(train_step, lsgd.average()), 2)
    state = cluster.init({"params": jnp.zeros(2), "n": jnp.int32(0)})
    with pytest.raises(TypeError, match=message):
        cluster.step(state, jnp.zeros(2))


STATE = {"params": jnp.zeros(2), "n": jnp.int32(0), "key": jax.random.key(0)}


def init(rule, state=STATE):
    """Initialises two workers with a local step that changes nothing."""
    return lsgd.simulate(lsgd.from_train_step(keep_state, rule), 2).init(state)


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
        (lambda: make_algorithm(3), TypeError, r"loss_fn must be callable, got 3"),
        (
            lambda: lsgd.local_sgd(lambda w, b: w, 0.1, rule=lsgd.average()),
            TypeError,
            r"an optax optimizer is needed.*got 0.1",
        ),
        (
            lambda: lsgd.from_train_step(3, lsgd.average()),
            TypeError,
            r"from_train_step\(train_step\): train_step must be callable, got 3",
        ),
        (lambda: lsgd.chain(), ValueError, "at least one rule is required, got none"),
        (lambda: lsgd.chain(lsgd.average), TypeError, "a SyncRule is needed"),
        (
            lambda: lsgd.when(4, lsgd.average()),
            TypeError,
            "schedule must be callable, got 4",
        ),
        (lambda: lsgd.when(lsgd.every(4), 4), TypeError, "a SyncRule is needed"),
        (
            lambda: lsgd.gated(None, 4),
            TypeError,
            r"gated\(cluster\): cluster must be a Cluster, got None",
        ),
        (lambda: lsgd.consensus(init(lsgd.average()), "w"), ValueError, "field 'w'"),
    ],
)
def test_invalid_arguments_raise(call, error, message):
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
def test_invalid_loss_raises(loss_fn, message):
    cluster = lsgd.simulate(make_algorithm(loss_fn), 2)
    with pytest.raises(TypeError, match=message):
        cluster.step(cluster.init(0.0), jnp.zeros(2))


def stateless_rule(apply):
    return lsgd.SyncRule(lambda tree, specs: lsgd.RuleState(), apply)


@pytest.mark.parametrize(
    "rule, message",
    [
        (
            stateless_rule(lambda tree, state, context: tree),
            r"apply must return \(tree, Rule",
        ),
        (
            stateless_rule(lambda t, state, context: (t.astype(jnp.float16), state)),
            r"field 'params': the tree must keep.*float16\[2\] from float32\[2\]",
        ),
        (
            stateless_rule(
                lambda tree, state, context: (tree, lsgd.RuleState(local=tree))
            ),
            "the RuleState must keep its structure",
        ),
    ],
)
def test_invalid_rule_output_raises(rule, message):
    cluster = lsgd.simulate(lsgd.from_train_step(keep_state, rule), 2)
    with pytest.raises(TypeError, match=message):
        cluster.sync(cluster.init(STATE))


def test_rule_init_without_rule_state_raises():
    rule = lsgd.SyncRule(
        lambda tree, specs: None, lambda tree, state, context: (tree, state)
    )
    with pytest.raises(TypeError, match="'params': init must return a RuleState"):
        init(rule)


@pytest.mark.parametrize(
    "result_of, metrics",
    [
        (lambda state, loss: state, {}),
        (lambda state, loss: (state, loss), "loss"),
        (lambda state, loss: (loss, state), "loss"),
        (lambda state, loss: (state, loss, 2 * loss), ("loss", "twice")),
        (lambda state, loss: [loss, state, 2 * loss], ("loss", "twice")),
    ],
    ids=["state", "pair", "loss_first", "triple", "list"],
)
def test_forms_of_the_result_of_a_train_step(result_of, metrics):
    def train_step(state, batch):
        new = {"params": state["params"] - batch, "steps": state["steps"] + 1}
        return result_of(new, batch)

    cluster = lsgd.simulate(lsgd.from_train_step(train_step, lsgd.average()), 2)
    start = {"params": jnp.zeros(()), "steps": jnp.int32(0)}
    loss = jnp.array([1.0, 2.0])
    state, values = cluster.step(cluster.init(start), loss)
    np.testing.assert_array_equal(state.workers["params"], -loss)
    expected = {"loss": loss, "twice": 2 * loss}
    assert_same(values, jax.tree.map(lambda name: expected[name], metrics))


@pytest.mark.parametrize("result", [None, (), 3.0])
def test_a_train_step_without_a_state_raises(result):
    algorithm = lsgd.from_train_step(lambda s, b: result, lsgd.identity())
    cluster = lsgd.simulate(algorithm, 2)
    with pytest.raises(TypeError, match="train_step must return the train state"):
        cluster.step(cluster.init(STATE), jnp.zeros(2))


def test_a_raw_key_in_a_train_state_raises():
    algorithm = lsgd.from_train_step(keep_state, lsgd.average())
    start = {"params": jnp.zeros(2), "noise": {"key": jax.random.PRNGKey(0)}}
    with pytest.raises(TypeError, match=r"raw PRNG key at \['noise'\]\['key'\]"):
        lsgd.simulate(algorithm, 2).init(start)


def test_python_numbers_are_valid_parameters():
    cluster = lsgd.simulate(make_algorithm(lambda p, b: (p["w"] - b) ** 2), 2)
    state, _ = cluster.step(cluster.init({"w": 0.0}), np.array([1.0, 3.0]))
    assert_close(cluster.sync(state).workers.params, {"w": np.full(2, 2.0, np.float32)})
