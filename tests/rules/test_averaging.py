"""Averages, and local SGD with them, against plain optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import (
    PLACEMENTS,
    RULES,
    algorithm,
    assert_close,
    batches,
    loss_fn,
    network,
    run_manually,
)
from harness.rule_arrays import sync_tree
from harness.selection import in_full

import localsgd_jax as lsgd


def test_mean_is_weighted():
    target = np.arange(4, dtype=np.float32)
    made = lsgd.local_sgd(
        lambda w, b: (w - b) ** 2, optax.sgd(0.5), rule=lsgd.average()
    )
    cluster = lsgd.simulate(made, workers=4)
    state, _ = cluster.step(cluster.init(np.float32(9)), target)
    np.testing.assert_array_equal(state.workers.params, target)
    synced = cluster.sync(state, np.array([1.0, 2.0, 0.0, 5.0]))
    np.testing.assert_allclose(synced.workers.params, np.full(4, (2 + 15) / 8))


@pytest.mark.parametrize("name", ["average", "chain", "when_every_round"])
def test_period_one_with_sgd_equals_large_batch_sgd(name):
    optimizer = optax.sgd(0.1)
    state, _ = run_manually(
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


@pytest.mark.parametrize("name", ["average", in_full("identity")])
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(optax.adam(0.05), id="adam"),
        pytest.param(
            optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)),
            id="clip",
        ),
        in_full(optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2), id="accumulate"),
        pytest.param(
            optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(5)),
            id="lbfgs",
        ),
        in_full(optax.polyak_sgd(), id="polyak"),
        in_full(
            optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
            id="plateau",
        ),
    ],
)
def test_one_worker_matches_plain_optax(name, optimizer):
    made = algorithm(RULES[name].rule, optimizer)
    # Few steps: on changing batches L-BFGS multiplies rounding errors.
    state, _ = run_manually(
        lsgd.simulate(made, 1), batches(3, workers=1), lsgd.every(2)
    )
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


def test_integer_leaf_raises():
    message = r"average\(\): every leaf must be floating point.*int32 at \['n'\]"
    with pytest.raises(TypeError, match=message):
        sync_tree(lsgd.average(), {"n": jnp.arange(3)})
