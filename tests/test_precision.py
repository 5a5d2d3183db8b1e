"""What optax and half precision do inside a worker: as alone, whatever others do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_close, assert_same, batches, loss_fn, mesh, network
from flax import linen as nn

import localsgd_jax as lsgd

K = 4
PLACES = {
    "simulate": lambda made: lsgd.simulate(made, K),
    "mesh": lambda made: lsgd.on_mesh(made, mesh(worker=K)),
    "lanes": lambda made: lsgd.on_mesh(made, mesh(worker=2), workers=K),
}
places = pytest.mark.parametrize("place", PLACES)


def alone(optimizer, hands, loss_fn=loss_fn):
    """Each worker's parameters by plain optax, one worker at a time."""

    @jax.jit
    def step(params, opt_state, batch):
        grad = jax.grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grad, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    found = []
    for k in range(K):
        params = jax.tree.map(jnp.asarray, network())
        opt_state = optimizer.init(params)
        for hand in hands:
            params, opt_state = step(
                params, opt_state, jax.tree.map(lambda x, k=k: x[k], hand)
            )
        found.append(params)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


def uneven(steps):
    """Batches on which the gradients of workers are of very different sizes."""
    scale = 10.0 ** np.arange(K, dtype=np.float32)
    return [(x, y * scale[:, None]) for x, y in batches(steps, workers=K)]


@places
def test_gradients_are_clipped_by_each_workers_own_norm(place):
    """The largest worker has a thousand times the gradient of the smallest."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    made = lsgd.local_sgd(loss_fn, optimizer, rule=lsgd.average())
    cluster = PLACES[place](made)
    state = cluster.init(network())
    for hand in uneven(3):
        state, _ = cluster.step(state, hand)
    assert_close(state.workers.params, alone(optimizer, uneven(3)), rtol=1e-4)
    moved = jax.tree.map(
        lambda x, start: np.asarray(x) - start, state.workers.params, network()
    )
    lengths = jax.vmap(optax.tree.norm)(moved)
    assert np.all(lengths <= 3 * 0.1 + 1e-5) and lengths[K - 1] > 0.1


@places
def test_gradients_accumulate_in_each_worker(place):
    """MultiSteps moves every third step, though a round ends in between."""
    optimizer = optax.MultiSteps(optax.adam(0.05), every_k_schedule=3)
    made = lsgd.local_sgd(loss_fn, optimizer, rule=lsgd.average())
    cluster = PLACES[place](made)
    state, hands = cluster.init(network()), batches(6, workers=K)
    for step, hand in enumerate(hands[:3], 1):
        before = state.workers.params
        state, _ = cluster.step(state, hand)
        if step < 3:
            assert_same(state.workers.params, before)
    assert_close(state.workers.params, alone(optimizer, hands[:3]), rtol=1e-4)
    state = cluster.sync(cluster.step(state, hands[3])[0])
    opt_state = state.workers.opt_state
    assert opt_state.mini_step.tolist() == [1] * K
    assert opt_state.gradient_step.tolist() == [1] * K
    sums = opt_state.acc_grads["out"]
    assert not np.allclose(sums, sums[0][None]), "a worker's own, the mean is not taken"


class Model(nn.Module):
    """A layer that computes in one precision and keeps its parameters in another."""

    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        kind = {"dtype": jnp.bfloat16, "param_dtype": self.param_dtype}
        return nn.Dense(1, **kind)(nn.tanh(nn.Dense(8, **kind)(x)))[:, 0]


def trained(place, param_dtype, optimizer):
    model = Model(param_dtype)

    def loss_fn(params, batch):
        inputs, targets = batch
        out = model.apply(params, inputs)
        assert out.dtype == jnp.bfloat16
        return jnp.mean((out.astype(jnp.float32) - targets) ** 2)

    params = model.init(jax.random.key(0), jnp.ones((1, 3)))
    cluster = PLACES[place](lsgd.local_sgd(loss_fn, optimizer, rule=lsgd.average()))
    state = cluster.init(params)
    for hand in batches(3, workers=K):
        state, _ = cluster.step(state, hand)
    return state, cluster.sync(state)


@places
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_the_mean_keeps_the_precision_of_the_parameters(place, param_dtype):
    """Computed in bfloat16; the mean is that of float64, rounded to the dtype."""
    before, after = trained(place, param_dtype, optax.adam(0.05))
    for old, new in zip(
        jax.tree.leaves(before.workers.params),
        jax.tree.leaves(after.workers.params),
        strict=True,
    ):
        assert old.dtype == new.dtype == param_dtype
        mean = np.mean(np.asarray(old, np.float64), axis=0)
        # Rounded once: half a unit in the last place of bfloat16.
        rtol = 2.0**-8 if param_dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(
            np.asarray(new[0], np.float64), mean, rtol=rtol, atol=1e-7
        )
    moment = after.workers.opt_state[0].mu["params"]["Dense_0"]["kernel"]
    assert moment.dtype == param_dtype


def test_moments_may_be_wider_than_parameters():
    """Float32 moments of bfloat16 parameters stay float32 through an average."""
    optimizer = optax.adam(0.05, mu_dtype=jnp.float32)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), network())
    rule = {"params": lsgd.average(), "opt_state": lsgd.floats(lsgd.average())}
    cluster = lsgd.simulate(lsgd.local_sgd(loss_fn, optimizer, rule=rule), K)
    state = cluster.init(params)
    hands = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), batches(2, workers=K))
    for hand in hands:
        state = cluster.sync(cluster.step(state, hand)[0])
    assert state.workers.params["out"].dtype == jnp.bfloat16
    assert state.workers.opt_state[0].mu["out"].dtype == jnp.float32
