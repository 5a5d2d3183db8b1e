"""Control variates against hand computation and NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localsgd_jax as lsgd

K, STEPS, RATE, PERIOD = 4, 12, 0.05, 3
FIELDS = ("params", "correction")


def quadratic(x, batch):
    curvature, optimum = batch
    return jnp.sum(curvature / 2 * (x - optimum) ** 2)


def run(cluster, state, batches, weights, period):
    """Yields the state after each synchronisation."""
    for t, batch in enumerate(batches, 1):
        state, _ = cluster.step(state, batch)
        if t % period == 0:
            state = cluster.sync(state, weights and weights[t // period - 1])
            yield state


def reference(batches, weights):
    """The equations in float64: means and corrections after each synchronisation."""
    x, m = np.zeros((K, 3)), np.zeros((K, 3))
    for t, (curvature, optimum) in enumerate(batches, 1):
        x = x - RATE * (curvature * (x - optimum) + m)
        if t % PERIOD == 0:
            w = np.ones(K) if weights is None else weights[t // PERIOD - 1]
            mean = w @ x / w.sum()
            m = m + (w > 0)[:, None] * (x - mean) / (PERIOD * RATE)
            x = np.tile(mean, (K, 1))
            yield mean, m


def test_two_quadratics_match_hand_computation():
    """f₁ = x²/2, f₂ = (x − 3)²; the minimum of their mean is 2."""
    batch = jnp.array([1.0, 2]), jnp.array([0.0, 3])
    algorithm = lsgd.local_sgd(
        quadratic, optax.sgd(0.1), lsgd.control_variates(0.1, period=2)
    )
    cluster = lsgd.simulate(algorithm, workers=2)
    states = list(run(cluster, cluster.init(0.0), [batch] * 200, None, 2))
    means = [float(lsgd.consensus(state)) for state in states]
    first = [float(state.workers.correction[0]) for state in states[:3]]
    np.testing.assert_allclose(means[:3], [0.54, 0.945, 1.23849], rtol=1e-6)
    np.testing.assert_allclose(first, [-2.7, -2.673, -2.49885], rtol=1e-6)
    assert means[-1] == pytest.approx(2, abs=1e-6)
    plain = lsgd.simulate(lsgd.local_sgd(quadratic, optax.sgd(0.1)), workers=2)
    *_, state = run(plain, plain.init(0.0), [batch] * 200, None, 2)
    assert float(lsgd.consensus(state)) == pytest.approx(1.9636, abs=1e-4)


@pytest.mark.parametrize("by_hand", [False, True], ids=["local_sgd", "train_step"])
def test_rounds_match_numpy(by_hand):
    """With equal weights, with a worker of weight 0, and with unequal weights."""
    rng = np.random.default_rng(0)
    batches = [(rng.uniform(1, 3, (K, 3)), rng.normal(size=(K, 3)))] * STEPS
    rule = lsgd.control_variates(RATE, PERIOD)

    def step(state, batch):
        grad = jax.grad(quadratic)(state["params"], batch) + state["correction"]
        return state | {"params": state["params"] - RATE * grad}, {}

    made = lsgd.local_sgd(quadratic, optax.sgd(RATE), rule)
    start = np.zeros(3)
    if by_hand:
        made = lsgd.from_train_step(step, {FIELDS: lsgd.when(lsgd.every(1), rule)})
        start = {"params": start, "correction": start}
    with jax.enable_x64(True):
        cluster = lsgd.simulate(made, K)
        for weights in (None, [np.array([1, 0, 1.0, 1])] * 4, [np.arange(K)] * 4):
            states = run(cluster, cluster.init(start), batches, weights, PERIOD)
            for state, (mean, m) in zip(
                states, reference(batches, weights), strict=True
            ):
                workers = state.workers if by_hand else state.workers._asdict()
                np.testing.assert_allclose(lsgd.consensus(state), mean, rtol=1e-12)
                np.testing.assert_allclose(workers["correction"], m, atol=1e-12)
                if weights is None:
                    np.testing.assert_allclose(m.sum(0), 0, atol=1e-12)


def test_the_correction_of_half_precision_is_wide():
    algorithm = lsgd.local_sgd(quadratic, optax.sgd(0.1), lsgd.control_variates(0.1, 1))
    cluster = lsgd.simulate(algorithm, workers=2)
    state = cluster.init(jnp.zeros(2, jnp.bfloat16))
    state, _ = cluster.step(state, (np.ones((2, 2), "f4"), np.eye(2, dtype="f4")))
    workers = cluster.sync(state).workers
    assert workers.correction.dtype == jnp.float32
    assert workers.params.dtype == jnp.bfloat16
    np.testing.assert_allclose(workers.correction[0], [0.5, -0.5], rtol=1e-2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: lsgd.control_variates(0, 2),
            ValueError,
            r"control_variates\(learning_rate\): \w+ must be positive, got 0",
        ),
        (lambda: lsgd.control_variates(0.1, 0), ValueError, "at least 1, got 0"),
        (lambda: lsgd.control_variates(0.1, 2.0), TypeError, "int, got 2.0"),
        (
            lambda: lsgd.control_variates(0.1, 2, lsgd.diloco()),
            ValueError,
            r"\(rule\): it must be a mean, such as average\(\), got diloco",
        ),
        (
            lambda: lsgd.local_sgd(
                quadratic, optax.sgd(0.1), {"params": lsgd.control_variates(0.1, 2)}
            ).init({"w": jnp.zeros(2)}),
            ValueError,
            r"fields \('params', 'correction'\) together.* got \['w'\]",
        ),
        (
            lambda: lsgd.from_train_step(
                lambda state, batch: (state, {}),
                {FIELDS: lsgd.control_variates(0.1, 2), "params": lsgd.average()},
            ),
            ValueError,
            r"from_train_step\(rule\): each field must have one rule, got \['params'\]",
        ),
    ],
)
def test_invalid_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
