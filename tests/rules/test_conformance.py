"""Published numbers, hand computations and other implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.selection import in_full, keep

import localsgd_jax as lsgd

# Values after the synchronisation and anchors, by delay τ and mixing weight α: fragment
# 0 after updates 3, 9, 15, fragment 1 after 6 and 12. Snapshots are τ steps earlier.
WITH_LEAD = {
    (0, 0.0): ([-11, -35, -59], [-11, -35, -59], [-23, -47], [-23, -47]),
    (0, 0.5): ([-8, -24.5, -40.25], [-11, -29, -44], [-17, -32], [-23, -35]),
    (0, 1.0): ([-5, -17, -29], [-11, -23, -35], [-11, -23], [-23, -23]),
    (1, 0.0): ([-7, -27, -47], [-7, -27, -47], [-19, -39], [-19, -39]),
    (1, 0.5): ([-6, -21.5, -35.75], [-7, -25, -38], [-15, -29], [-19, -31]),
    (1, 1.0): ([-5, -17, -29], [-7, -23, -31], [-11, -23], [-19, -23]),
}
# The same with snapshots at the steps of the schedule, applied one step later.
WITH_LAG = {
    0.0: ([-11, -31, -51], [-11, -31, -51], [-23, -43], [-23, -43]),
    0.5: ([-9, -24, -38.5], [-11, -27, -41], [-18, -31.5], [-23, -33]),
    1.0: ([-7, -19, -31], [-11, -23, -35], [-13, -25], [-23, -23]),
}


def descend(rule, due, steps=16):
    """Returns all states of two workers with constant gradient 2, starting at 1."""
    algorithm = lsgd.local_sgd(
        lambda x, batch: 2 * (x["a"] + x["b"]), optax.sgd(1.0), rule=rule
    )
    cluster = lsgd.simulate(algorithm, workers=2)
    step = jax.jit(lsgd.gated(cluster, due))
    state = cluster.init({"a": jnp.float32(1), "b": jnp.float32(1)})
    path = [state]
    for _ in range(steps):
        state, _ = step(state, jnp.zeros((2, 1)))
        path.append(state)
    return path


def streaming_diloco(alpha, delayed):
    """Returns a rule with two fragments, "a" and "b"."""
    rule = lsgd.outer(optax.sgd(2.0))
    rule = lsgd.interpolate(lsgd.delay(rule) if delayed else rule, alpha)
    grouping = {"a": 0, "b": 1}.get
    return lsgd.fragment(
        rule, 2, grouping=grouping, rounds_per_fragment=2 if delayed else 1
    )


def assert_trajectory(path, name, updates, values, anchors):
    found = [float(path[t].workers.params[name][1]) for t in updates]
    np.testing.assert_allclose(found, values, atol=1e-5)
    fragment = "ab".index(name)
    states = [path[t].shared["params"][fragment] for t in updates]
    np.testing.assert_allclose(
        [float(state.anchor[0]) for state in states], anchors, atol=1e-5
    )


@pytest.mark.parametrize(
    "tau, alpha",
    [pair if pair in ((0, 0.0), (1, 0.5)) else in_full(*pair) for pair in WITH_LEAD],
)
def test_streaming_trajectories_with_lead(tau, alpha):
    due = lsgd.evenly_spaced(6, 2)
    due = lsgd.with_lead(due, tau) if tau else due
    path = descend(streaming_diloco(alpha, tau > 0), due)
    x0, anchor0, x1, anchor1 = WITH_LEAD[tau, alpha]
    assert_trajectory(path, "a", (3, 9, 15), x0, anchor0)
    assert_trajectory(path, "b", (6, 12), x1, anchor1)
    if (tau, alpha) == (0, 0.0):
        a, b = ([float(s.workers.params[k][0]) for s in path] for k in "ab")
        assert a[:10] == [1, -1, -3, -11, -13, -15, -17, -19, -21, -35]
        assert b[:10] == [1, -1, -3, -5, -7, -9, -23, -25, -27, -29]
    if alpha == 1:
        for t, state in enumerate(path):
            assert float(state.workers.params["a"][0]) == 1 - 2 * t


@pytest.mark.parametrize("alpha", keep(WITH_LAG, [0.5]))
def test_streaming_trajectories_with_lag(alpha):
    path = descend(
        streaming_diloco(alpha, True), lsgd.with_lag(lsgd.evenly_spaced(6, 2), 1)
    )
    x0, anchor0, x1, anchor1 = WITH_LAG[alpha]
    assert_trajectory(path, "a", (4, 10, 16), x0, anchor0)
    assert_trajectory(path, "b", (7, 13), x1, anchor1)


def test_linear_model_with_outer_nesterov():
    """Losses and parameters computed in float64 for two workers and H = 3."""
    inputs = np.array([[[0, 1], [1, 0]], [[1, 0], [0, 1]]], np.float32)
    targets = np.array([[1, 2], [2, 3]], np.float32)

    def loss_fn(params, batch):
        x, y = batch
        return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)

    rule = lsgd.diloco(learning_rate=1.0, momentum=0.9)
    algorithm = lsgd.local_sgd(loss_fn, optax.sgd(0.1), rule=rule)
    cluster = lsgd.simulate(algorithm, workers=2)
    state = cluster.init({"kernel": jnp.array([2.0, 1.0]), "bias": jnp.float32(1)})
    losses = []
    for t in range(1, 7):
        state, metrics = cluster.step(state, (inputs, targets))
        losses.append(metrics["loss"])
        if t % 3 == 0:
            state = cluster.sync(state)
        if t == 3:
            params = lsgd.consensus(state)
            np.testing.assert_allclose(params["kernel"], [1.5345, 1.0494], atol=1e-6)
            np.testing.assert_allclose(params["bias"], 0.5839, atol=1e-6)
    params = lsgd.consensus(state)
    np.testing.assert_allclose(params["kernel"], [1.26281982, 1.24700781], atol=1e-6)
    np.testing.assert_allclose(params["bias"], 0.50982763, atol=1e-6)
    np.testing.assert_allclose(
        np.array(losses)[:4],
        [[1.0, 1.0], [0.49, 0.81], [0.2401, 0.6561], [0.20754373, 0.94094372]],
        atol=1e-6,
    )


def test_diloco_matches_hand_computation():
    """Worker gradients 1 and 3, inner SGD 0.1, H = 2: every pseudo-gradient is 0.4."""
    algorithm = lsgd.local_sgd(lambda x, g: x * g, optax.sgd(0.1), rule=lsgd.diloco())
    cluster = lsgd.simulate(algorithm, workers=2)
    state, seen = cluster.init(1.0), []
    for t in range(1, 7):
        state, _ = cluster.step(state, jnp.array([1.0, 3.0]))
        if t % 2 == 0:
            state = cluster.sync(state)
            seen.append(float(lsgd.consensus(state)))
    np.testing.assert_allclose(seen, [0.468, -0.2908, -1.25372], atol=1e-6)


@pytest.mark.parametrize(
    "inner, steps, tolerance",
    [(optax.sgd(0.25), 10, 0.0), (optax.adam(0.1), 25, 3e-7)],
    ids=["sgd", "adam"],
)
def test_one_worker_with_outer_sgd_matches_optax_lookahead(inner, steps, tolerance):
    """Exact for SGD. For Adam, optax rounds the fast weights in another order."""

    def loss_fn(params, batch=None):
        return jnp.sum((params - jnp.arange(1.0, 4.0)) ** 2)

    fast = optax.lookahead(inner, 5, 0.5)
    params = optax.LookaheadParams.init_synced(jnp.zeros(3))
    opt_state = fast.init(params)
    made = lsgd.local_sgd(loss_fn, inner, rule=lsgd.lookahead(0.5))
    cluster = lsgd.simulate(made, workers=1)
    state = cluster.init(jnp.zeros(3))
    for t in range(1, steps + 1):
        grads = jax.grad(loss_fn)(params.fast)
        updates, opt_state = fast.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        state, _ = cluster.step(state, jnp.zeros((1, 1)))
        state = cluster.sync(state) if t % 5 == 0 else state
        anchor = state.shared["params"].anchor
        for left, right in (
            (state.workers.params[0], params.fast),
            (anchor, params.slow),
        ):
            np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)
    assert float(jnp.abs(anchor).min()) > 0.5


def test_lookahead_matches_hand_computation():
    made = lsgd.local_sgd(lambda x, g: x * g, optax.sgd(1.0), rule=lsgd.lookahead(0.5))
    cluster = lsgd.simulate(made, workers=1)
    state, fast = cluster.init(3.0), []
    for t in range(1, 5):
        state, _ = cluster.step(state, jnp.ones(1))
        fast.append(float(state.workers.params[0]))
        state = cluster.sync(state) if t % 2 == 0 else state
        fast.append(float(state.workers.params[0]))
    assert fast == [2, 2, 1, 2, 1, 1, 0, 1]
