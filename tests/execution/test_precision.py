"""Optax transformations and half precision: each worker behaves as plain optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from harness.cases import assert_close, assert_same, batches, loss_fn, mesh, network
from harness.selection import in_full, keep

import localsgd_jax as lsgd

K = 4
PLACEMENTS = {
    "simulate": lambda made: lsgd.simulate(made, K),
    "mesh": lambda made: lsgd.on_mesh(made, mesh(worker=K)),
    "lanes": lambda made: lsgd.on_mesh(made, mesh(worker=2), workers=K),
}
placements = pytest.mark.parametrize("placement", keep(PLACEMENTS, ["lanes"]))


def run_optax(optimizer, batches, loss_fn=loss_fn):
    """The parameters of each worker by plain optax, one worker at a time."""

    @jax.jit
    def step(params, opt_state, batch):
        grad = jax.grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grad, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    workers = []
    for k in range(K):
        params = jax.tree.map(jnp.asarray, network())
        opt_state = optimizer.init(params)
        for batch in batches:
            params, opt_state = step(
                params, opt_state, jax.tree.map(lambda x, k=k: x[k], batch)
            )
        workers.append(params)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *workers)


def uneven_batches(steps):
    """Batches on which the gradient norms of the workers differ by decades."""
    scale = 10.0 ** np.arange(K, dtype=np.float32)
    return [(x, y * scale[:, None]) for x, y in batches(steps, workers=K)]


@placements
def test_gradients_are_clipped_by_norm_of_each_worker(placement):
    """The largest gradient is a thousand times the smallest."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    made = lsgd.local_sgd(loss_fn, optimizer, rule=lsgd.average())
    cluster = PLACEMENTS[placement](made)
    state = cluster.init(network())
    for batch in uneven_batches(3):
        state, _ = cluster.step(state, batch)
    expected = run_optax(optimizer, uneven_batches(3))
    assert_close(state.workers.params, expected, rtol=1e-4)
    moved = jax.tree.map(
        lambda x, start: np.asarray(x) - start, state.workers.params, network()
    )
    lengths = jax.vmap(optax.tree.norm)(moved)
    assert np.all(lengths <= 3 * 0.1 + 1e-5) and lengths[K - 1] > 0.1


@placements
def test_gradients_accumulate_per_worker(placement):
    """MultiSteps updates every third step, although a round ends in between."""
    optimizer = optax.MultiSteps(optax.adam(0.05), every_k_schedule=3)
    made = lsgd.local_sgd(loss_fn, optimizer, rule=lsgd.average())
    cluster = PLACEMENTS[placement](made)
    state, data = cluster.init(network()), batches(6, workers=K)
    for step, batch in enumerate(data[:3], 1):
        before = state.workers.params
        state, _ = cluster.step(state, batch)
        if step < 3:
            assert_same(state.workers.params, before)
    assert_close(state.workers.params, run_optax(optimizer, data[:3]), rtol=1e-4)
    state = cluster.sync(cluster.step(state, data[3])[0])
    opt_state = state.workers.opt_state
    assert opt_state.mini_step.tolist() == [1] * K
    assert opt_state.gradient_step.tolist() == [1] * K
    sums = opt_state.acc_grads["out"]
    assert not np.allclose(sums, sums[0][None]), "accumulators must not be averaged"


class Model(nn.Module):
    """Two layers that compute in bfloat16 with parameters of a given dtype."""

    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        kind = {"dtype": jnp.bfloat16, "param_dtype": self.param_dtype}
        return nn.Dense(1, **kind)(nn.tanh(nn.Dense(8, **kind)(x)))[:, 0]


def train(placement, param_dtype, optimizer):
    """Takes three steps; returns the states before and after a synchronisation."""
    model = Model(param_dtype)

    def loss_fn(params, batch):
        inputs, targets = batch
        out = model.apply(params, inputs)
        assert out.dtype == jnp.bfloat16
        return jnp.mean((out.astype(jnp.float32) - targets) ** 2)

    params = model.init(jax.random.key(0), jnp.ones((1, 3)))
    made = lsgd.local_sgd(loss_fn, optimizer, rule=lsgd.average())
    cluster = PLACEMENTS[placement](made)
    state = cluster.init(params)
    for batch in batches(3, workers=K):
        state, _ = cluster.step(state, batch)
    return state, cluster.sync(state)


@pytest.mark.parametrize(
    "placement, param_dtype",
    [
        in_full(placement, dtype, id=f"{placement}-{dtype}")
        if (placement, dtype) != ("lanes", "bfloat16")
        else pytest.param(placement, dtype, id=f"{placement}-{dtype}")
        for placement in PLACEMENTS
        for dtype in ("float32", "bfloat16")
    ],
)
def test_mean_keeps_dtype_of_params(placement, param_dtype):
    """The mean of a bfloat16 computation is the float64 mean, rounded to the dtype."""
    before, after = train(placement, jnp.dtype(param_dtype), optax.adam(0.05))
    for old, new in zip(
        jax.tree.leaves(before.workers.params),
        jax.tree.leaves(after.workers.params),
        strict=True,
    ):
        assert old.dtype == new.dtype == param_dtype
        mean = np.mean(np.asarray(old, np.float64), axis=0)
        # The mean is rounded once: half a unit in the last place of bfloat16.
        rtol = 2.0**-8 if param_dtype == "bfloat16" else 1e-6
        np.testing.assert_allclose(
            np.asarray(new[0], np.float64), mean, rtol=rtol, atol=1e-7
        )
    moment = after.workers.opt_state[0].mu["params"]["Dense_0"]["kernel"]
    assert moment.dtype == param_dtype


def test_float32_moments_with_bfloat16_params():
    """Float32 moments of bfloat16 parameters stay float32 through an average."""
    optimizer = optax.adam(0.05, mu_dtype=jnp.float32)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), network())
    rule = {"params": lsgd.average(), "opt_state": lsgd.floating_only(lsgd.average())}
    cluster = lsgd.simulate(lsgd.local_sgd(loss_fn, optimizer, rule=rule), K)
    state = cluster.init(params)
    data = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), batches(2, workers=K))
    for batch in data:
        state = cluster.sync(cluster.step(state, batch)[0])
    assert state.workers.params["out"].dtype == jnp.bfloat16
    assert state.workers.opt_state[0].mu["out"].dtype == jnp.float32
