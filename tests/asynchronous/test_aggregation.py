"""Server update rules: weighting, server optimizers, delayed Nesterov, snapshots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.asynchronous_cases import (
    DIMENSION,
    float32_batches,
    host_batches,
    integer_batches,
    linear_loss,
    make_algorithm,
)
from harness.cases import assert_close
from harness.reference_sgd import quadratic_loss
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax import asynchronous
from localsgd_jax.asynchronous import EventKind


@functools.cache
def final_aggregate(aggregation):
    """The aggregate of four workers after a run on the quadratic."""
    events = asynchronous.simulate_events(4, 12, 3, speed=[1, 1, 1, 0.25], delay=2.0)
    cluster = asynchronous.simulate(make_algorithm(quadratic_loss), events, aggregation)
    state = cluster.init(jnp.ones(DIMENSION))
    return cluster.run(state, float32_batches(12, 4))[0].aggregate


@pytest.mark.parametrize(
    "weighting",
    [
        pytest.param(None, id="constant"),
        in_full(asynchronous.polynomial_weighting(0), id="polynomial"),
    ],
)
def test_server_sgd_of_rate_one_is_mean_update(weighting):
    server = asynchronous.server_optimizer(optax.sgd(1.0), weighting)
    assert_close(final_aggregate(server), final_aggregate(None))


def test_weighting_matches_hand_computation():
    # When worker 1 ends its step at 4, three updates of worker 0 have been applied, at
    # 1, 2 and 3; the update at 4 is simultaneous.
    events = asynchronous.simulate_events(2, [4, 1], 1, speed=[1, 0.25])
    applied = events.kind == EventKind.APPLY
    assert events.worker[applied].tolist() == [0, 0, 0, 0, 1]
    assert events.staleness_updates[applied].tolist() == [0, 0, 0, 0, 3]
    batches = np.zeros((4, 2), np.float32)
    batches[0] = -1, -16
    for weighting, expected in (
        (asynchronous.constant_weighting(0.25), 0.25 * (1 + 16) / 2),
        (asynchronous.polynomial_weighting(0.5), (1 + 16 / 2) / 2),  # (1 + 3)^−½ = ½
        (asynchronous.polynomial_weighting(1.0), (1 + 16 / 4) / 2),
    ):
        server = asynchronous.server_optimizer(optax.sgd(1.0), weighting)
        algorithm = make_algorithm(linear_loss, optax.sgd(1.0))
        cluster = asynchronous.simulate(algorithm, events, server)
        state, _ = cluster.run(cluster.init(jnp.zeros(())), batches)
        assert float(state.aggregate) == pytest.approx(expected, rel=1e-6)


def reference_nesterov(updates, staleness, rate, beta, n, c, power):
    """Algorithm 3 of Liu et al. (2024) in NumPy float64; returns all iterates."""
    z, m, buffer, path = 1.0, 0.0, 0.0, []
    for t, (p, s) in enumerate(zip(updates, staleness, strict=True)):
        g = -p / (1 + s) ** power
        buffer += g
        if (t + 1) % n == 0:
            m = beta * m + buffer / n
            z -= rate * ((1 - c * n + c) * beta * m + g / n)
            buffer = 0.0
        else:
            z -= rate * (c * beta * m + g / n)
        path.append(z)
    return path


@pytest.mark.parametrize(
    "buffer, c, power",
    [
        (None, 0.0, 0.0),
        in_full(None, 0.2, 0.0),
        in_full(3, 0.1, 0.0),
        in_full(1, 0.5, 0.0),
        in_full(None, 0.0, 0.5),
        in_full(None, 0.2, 0.5),
        (3, 0.1, 0.5),
        in_full(1, 0.5, 0.5),
    ],
)
def test_delayed_nesterov_matches_algorithm_3(buffer, c, power):
    rng = np.random.default_rng(0)
    updates, staleness = rng.normal(size=13), rng.integers(0, 6, 13)
    expected = reference_nesterov(updates, staleness, 0.7, 0.9, buffer or 4, c, power)
    with jax.enable_x64(True):
        aggregation = asynchronous.delayed_nesterov(
            0.7,
            0.9,
            buffer=buffer,
            activation=c,
            weighting=asynchronous.polynomial_weighting(power),
        )
        z = jnp.float64(1)
        state = aggregation.init(z)
        for p, s, value in zip(updates, staleness, expected, strict=True):
            context = asynchronous.UpdateContext(4, jnp.int32(s))
            z, state = aggregation.apply(z, jnp.float64(p), state, context)
            np.testing.assert_allclose(z, value, rtol=1e-12)
    assert int(state.count) == 13


def test_delayed_nesterov_with_buffer_of_one_is_nesterov():
    events = asynchronous.simulate_events(1, 12, 3)
    aggregates = []
    for aggregation in (
        asynchronous.delayed_nesterov(0.7, 0.9, buffer=1, activation=1.0),
        asynchronous.server_optimizer(optax.sgd(0.7, momentum=0.9, nesterov=True)),
    ):
        algorithm = make_algorithm(quadratic_loss)
        cluster = asynchronous.simulate(algorithm, events, aggregation)
        state = cluster.init(jnp.ones(DIMENSION))
        aggregates.append(cluster.run(state, float32_batches(12, 1))[0].aggregate)
    assert_close(*aggregates)


@pytest.mark.parametrize(
    "aggregation",
    [
        pytest.param(
            asynchronous.server_optimizer(
                optax.adam(0.1), asynchronous.polynomial_weighting()
            ),
            id="server_optimizer",
        ),
        in_full(
            asynchronous.delayed_nesterov(
                0.7, weighting=asynchronous.polynomial_weighting()
            ),
            id="delayed_nesterov",
        ),
    ],
)
def test_threads_match_simulation_of_one_worker(aggregation):
    # The order of updates is deterministic with a single thread.
    batches = float32_batches(12, 1)
    algorithm = make_algorithm(quadratic_loss)
    events = asynchronous.simulate_events(1, 12, 3)
    simulated = asynchronous.simulate(algorithm, events, aggregation)
    threaded = asynchronous.on_threads(algorithm, jax.devices()[:1], aggregation)
    start = simulated.init(jnp.ones(DIMENSION))
    expected, metrics = simulated.run(start, batches)
    state, history = threaded.run(start, host_batches(12, 1), schedule=3)
    assert_close(state, expected)
    np.testing.assert_allclose(
        history["loss"], metrics["loss"].reshape(4, 3).mean(axis=1), rtol=1e-5
    )


def test_snapshots_without_stragglers_are_rounds_of_algorithm_1():
    batches = integer_batches(12, 4)
    algorithm = make_algorithm(linear_loss)
    cluster = lsgd.simulate(algorithm, 4)
    state, means = cluster.init(jnp.zeros(3)), []
    one_round = jax.jit(lsgd.fused(cluster))
    for i in range(0, 12, 3):
        state, _ = one_round(state, jnp.stack(batches[i : i + 3]))
        means.append(lsgd.consensus(state))
    events = asynchronous.simulate_events(4, 12, 3)
    for inner in (None, asynchronous.server_optimizer(optax.sgd(1.0))):
        aggregation = asynchronous.with_snapshots(inner, count=3, every=4)
        cluster = asynchronous.simulate(algorithm, events, aggregation)
        state, _ = cluster.run(cluster.init(jnp.zeros(3)), jnp.stack(batches))
        assert state.aggregation_state.num_updates == 16
        # The fourth snapshot has no row and overwrites none.
        snapshots = state.aggregation_state.snapshots
        np.testing.assert_allclose(snapshots, means[:3], 1e-6, 1e-6)
        np.testing.assert_allclose(state.aggregate, means[3], 1e-6, 1e-6)


def test_snapshots_of_threads_continue_over_runs():
    aggregation = asynchronous.with_snapshots(count=8, every=2)
    cluster = asynchronous.on_threads(
        make_algorithm(linear_loss), jax.devices()[:1], aggregation
    )
    state, aggregates = cluster.init(jnp.zeros(3)), []
    for _ in range(3):
        state, _ = cluster.run(state, [np.ones((1, 3), np.float32)] * 4, schedule=2)
        aggregates.append(state.aggregate)
    snapshots = state.aggregation_state.snapshots
    np.testing.assert_array_equal(snapshots[:3], aggregates)
    np.testing.assert_array_equal(snapshots[3:], 0)
    assert np.abs(np.diff(aggregates, axis=0)).min() > 0


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: asynchronous.constant_weighting(0),
            ValueError,
            r"constant_weighting\(value\): \w+ must be positive, got 0",
        ),
        in_full(
            lambda: asynchronous.polynomial_weighting(-0.5),
            ValueError,
            r"polynomial_weighting\(power\): power must be at least 0, got -0.5",
        ),
        in_full(
            lambda: asynchronous.with_snapshots(count=0),
            ValueError,
            r"with_snapshots\(count\): \w+ must be at least 1, got 0",
        ),
        in_full(
            lambda: asynchronous.with_snapshots(count=2, every=0.5),
            TypeError,
            r"with_snapshots\(every\): \w+ must be an int, got 0.5",
        ),
        (
            lambda: asynchronous.with_snapshots(0.7, count=2),
            TypeError,
            r"with_snapshots\(aggregation\): an Aggregation is needed.*got 0.7",
        ),
        (
            lambda: asynchronous.server_optimizer(0.7),
            TypeError,
            r"server_optimizer\(optimizer\): an optax optimizer is needed.*got 0.7",
        ),
        (
            lambda: asynchronous.server_optimizer(optax.sgd(0.7), 0.5),
            TypeError,
            r"server_optimizer\(weighting\): weighting must be callable, got 0.5",
        ),
        in_full(
            lambda: asynchronous.delayed_nesterov(0),
            ValueError,
            r"delayed_nesterov\(learning_rate\): \w+ must be positive, got 0",
        ),
        (
            lambda: asynchronous.delayed_nesterov(0.7, 1.0),
            ValueError,
            r"delayed_nesterov\(momentum\): \w+ must be in \[0, 1\), got 1.0",
        ),
        in_full(
            lambda: asynchronous.delayed_nesterov(0.7, buffer=0),
            ValueError,
            r"delayed_nesterov\(buffer\): \w+ must be at least 1, got 0",
        ),
        in_full(
            lambda: asynchronous.delayed_nesterov(0.7, buffer=2.0),
            TypeError,
            r"delayed_nesterov\(buffer\): \w+ must be an int, got 2.0",
        ),
        (
            lambda: asynchronous.delayed_nesterov(0.7, buffer=4, activation=0.3),
            ValueError,
            r"\(activation\): activation must be in \[0, 0.25\], got 0.3",
        ),
        in_full(
            lambda: asynchronous.delayed_nesterov(0.7, activation=1.5),
            ValueError,
            r"\(activation\): activation must be in \[0, 1.0\], got 1.5",
        ),
        in_full(
            lambda: final_aggregate(asynchronous.delayed_nesterov(0.7, activation=0.3)),
            ValueError,
            r"\(activation\): activation must be in \[0, 0.25\], got 0.3",
        ),
    ],
)
def test_invalid_aggregation_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
