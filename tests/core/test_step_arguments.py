"""Training steps of several arguments, with leaves that are no arrays."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.core.static_leaves import mark_static, restore_static

TX = optax.sgd(0.1, momentum=0.9)
BATCH = np.arange(12, dtype=np.float32).reshape(2, 2, 3) / 12


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A module with functions, strings and numbers among its leaves."""

    weight: jax.Array
    activation: Callable
    name: str = "layer"
    scale: float = 2.0
    is_wide: bool = False

    def __call__(self, x):
        assert isinstance(self.scale, float) and self.name == "layer"
        return self.activation(x @ self.weight) * (self.scale if self.is_wide else 1)


def module():
    return Module(jnp.ones(3), jnp.tanh)


def make_step(model, opt_state, x, y):
    def loss_fn(weight):
        return jnp.mean((dataclasses.replace(model, weight=weight)(x) - y) ** 2)

    loss, grad = jax.value_and_grad(loss_fn)(model.weight)
    updates, opt_state = TX.update(grad, opt_state, model.weight)
    model = dataclasses.replace(model, weight=model.weight + updates)
    return loss, model, opt_state


@pytest.mark.parametrize("placement", ["simulate", in_full("mesh")])
def test_modules_with_static_leaves_keep_them(placement):
    start = module()
    algorithm, state = lsgd.from_arguments(make_step, start, TX.init(start.weight))
    cluster = lsgd.simulate(algorithm, 2)
    if placement == "mesh":
        cluster = lsgd.on_mesh(algorithm, lsgd.worker_mesh(2), 2)
    state, loss = cluster.step(cluster.init(state), (BATCH, jnp.ones((2, 2))))
    assert loss.shape == (2,)
    model, opt_state = lsgd.consensus(cluster.sync(state), None)
    assert (model.activation, model.scale, model.is_wide) == (jnp.tanh, 2.0, False)
    rows = [
        make_step(start, TX.init(start.weight), x, jnp.ones(2))[1].weight for x in BATCH
    ]
    np.testing.assert_allclose(model.weight, np.mean(rows, 0), rtol=1e-6)
    assert jax.tree.structure(opt_state) == jax.tree.structure(TX.init(start.weight))


def test_static_leaves_are_restored():
    tree = {"f": jnp.tanh, "x": np.ones(2), "n": 3, "list": [None, "text"]}
    marked = mark_static(tree)
    assert jax.tree.map(np.shape, jax.tree.leaves(marked)) == [(2,)]
    assert jax.tree.structure(marked) == jax.tree.structure(mark_static(tree))
    restored = restore_static(marked)
    assert (restored["f"], restored["n"], restored["list"]) == (
        jnp.tanh,
        3,
        [None, "text"],
    )


def test_results_may_have_any_order():
    def step(params, ema, batch):
        params = params - 0.5 * batch
        return jnp.float32(7), params, 0.5 * (ema + params)

    algorithm, start = lsgd.from_arguments(step, jnp.zeros(3), jnp.ones(3))
    new, metrics = algorithm.step(start, jnp.ones(3))
    np.testing.assert_allclose(new.params, -0.5)
    np.testing.assert_allclose(new.ema, 0.25)
    assert metrics == 7


@pytest.mark.parametrize(
    "step, values, message",
    [
        (lambda w: w, (jnp.ones(2),), "must take the values and a batch"),
        (lambda w, b: w, (), "must take the values and a batch"),
        (lambda w, b: w, ({"w": 1.0},), "'w' must have arrays"),
        (3, (jnp.ones(2),), "must be"),
    ],
)
def test_wrong_arguments_raise(step, values, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lsgd.from_arguments(step, *values)


def test_a_missing_result_raises():
    algorithm, start = lsgd.from_arguments(
        lambda w, n, b: (w, 0.0), jnp.ones(2), np.arange(3)
    )
    with pytest.raises(TypeError, match="must return the new value of 'n'"):
        algorithm.step(start, jnp.ones(2))
