"""Optimizers of optax with signatures or parameters of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.selection import in_full

import localsgd_jax as lsgd

BATCHES = np.random.default_rng(0).normal(size=(6, 2, 4, 3)).astype(np.float32)


def loss_fn(params, batch):
    return jnp.mean((batch @ params - 1) ** 2)


GRAD_FN = jax.grad(loss_fn)


def run(optimizer, params):
    """Returns the workers after the batches, without synchronisation."""
    cluster = lsgd.simulate(lsgd.local_sgd(loss_fn, optimizer), 2)
    state = cluster.init(params)
    for batch in BATCHES:
        state, _ = cluster.step(state, batch)
    return state


@pytest.mark.parametrize("opaque", [False, in_full(True)])
def test_sam_equals_a_plain_loop(opaque):
    optimizer = optax.contrib.sam(
        optax.sgd(0.1), optax.sgd(0.05), sync_period=2, opaque_mode=opaque
    )
    state = run(optimizer, jnp.zeros(3))
    for k in range(2):
        params = jnp.zeros(3)
        opt_state = optimizer.init(params)
        for batch in BATCHES[:, k]:
            extra = {"grad_fn": lambda p, _, b=batch: GRAD_FN(p, b)} if opaque else {}
            grad = GRAD_FN(params, batch)
            updates, opt_state = optimizer.update(grad, opt_state, params, **extra)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(state.workers.params[k], params, rtol=1e-5)


def test_lookahead_equals_a_plain_loop():
    optimizer = optax.lookahead(optax.sgd(0.1), sync_period=3, slow_step_size=0.5)
    start = optax.LookaheadParams.init_synced(jnp.zeros(3))
    state = run(optimizer, start)
    params, opt_state = start, optimizer.init(start)
    for batch in BATCHES[:, 1]:
        grad = jax.grad(loss_fn)(params.fast, batch)
        updates, opt_state = optimizer.update(grad, opt_state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(state.workers.params.slow[1], params.slow, rtol=1e-5)
    assert isinstance(lsgd.consensus(state), optax.LookaheadParams)
