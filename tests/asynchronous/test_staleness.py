"""Corrections of stale updates against hand computation and NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import assert_close

from localsgd_jax import asynchronous
from localsgd_jax.asynchronous import UpdateContext


@pytest.mark.parametrize(
    "momentum, expected",
    [
        ([3, 0.3], [1, 0]),  # Aligned.
        ([0, 0], [1, 0]),  # No momentum yet.
        ([-1, 0], [0.5, 0]),  # Opposed: conf = ½, β = ½.
        ([0, 1], [0.5**0.5, 0.5**0.5]),  # Orthogonal: conf = ½, λ = ½.
        ([-3, 0], [0.75, 0]),  # A long momentum: conf = ¼, β = ¼.
    ],
)
def test_alignment_matches_hand_computation(momentum, expected):
    aligned = asynchronous.align_to_momentum(
        jnp.array([1.0, 0]), jnp.array(momentum, jnp.float32)
    )
    np.testing.assert_allclose(aligned, expected, rtol=1e-6)


def align(delta, m):
    """The equations in float64."""
    norm, m_norm = np.linalg.norm(delta), np.linalg.norm(m)
    if norm == 0 or m_norm == 0:
        return delta
    u, v = delta / norm, m / m_norm
    c, confidence = u @ v, norm / (norm + m_norm)
    if c >= 0.2:
        return delta
    if c < 0:
        return delta - min(-c * confidence, 0.5) * c * norm * v
    share = min((1 - c / 0.2) * confidence, 1)
    mixed = (1 - share) * u + share * v
    return norm * mixed / np.linalg.norm(mixed)


def gate(s):
    return (1 + np.cos(np.pi * s / 4)) / 2 * np.exp(-0.1 * s) if s < 4 else 0.0


def test_aligned_nesterov_matches_numpy():
    """Each tensor is aligned by itself; updates from the cutoff on count nothing."""
    weighting = asynchronous.cosine_gated_weighting(4, decay=0.1)
    aggregation = asynchronous.aligned_nesterov(0.7, 0.9, weighting=weighting)
    rng, kinds = np.random.default_rng(0), set()
    z = {"a": np.zeros(3), "b": np.zeros(2)}
    m = {name: np.zeros_like(x) for name, x in z.items()}
    with jax.enable_x64(True):
        aggregate = jax.tree.map(jnp.asarray, z)
        state, apply = (
            aggregation.init(aggregate),
            jax.jit(
                lambda *args: aggregation.apply(*args[:3], UpdateContext(2, args[3]))
            ),
        )
        for staleness in [0, 1, 2, 5, 3, 0, 4, 1, 0, 2]:
            p = {name: rng.normal(size=x.shape) for name, x in z.items()}
            aggregate, state = apply(aggregate, p, state, jnp.int32(staleness))
            for name in z:
                g = gate(staleness) * align(-p[name], m[name]) / 2
                kinds.add(bool(p[name] @ m[name] > 0))
                m[name] = 0.9 * m[name] + g
                z[name] = z[name] - 0.7 * (0.9 * m[name] + g)
            assert_close(aggregate, jax.tree.map(jnp.asarray, z), 1e-6)
    assert kinds == {True, False}


def test_without_alignment_it_is_the_server_optimizer():
    context = UpdateContext(4, jnp.int32(3))
    weighting = asynchronous.polynomial_weighting(0.5)
    pair = (
        asynchronous.aligned_nesterov(
            0.7, 0.9, weighting=weighting, align=lambda gradient, momentum: gradient
        ),
        asynchronous.server_optimizer(optax.sgd(0.7, 0.9, nesterov=True), weighting),
    )
    results = []
    for aggregation in pair:
        aggregate = jnp.zeros(3)
        state = aggregation.init(aggregate)
        for i in range(3):
            update = jnp.arange(3.0) - i
            aggregate, state = aggregation.apply(aggregate, update, state, context)
        results.append(aggregate)
    assert_close(*results)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: asynchronous.cosine_gated_weighting(0),
            ValueError,
            r"cosine_gated_weighting\(cutoff\): \w+ must be positive, got 0",
        ),
        (
            lambda: asynchronous.cosine_gated_weighting(4, -1),
            ValueError,
            r"\(decay\): decay must be at least 0, got -1",
        ),
        (
            lambda: asynchronous.aligned_nesterov(0),
            ValueError,
            r"aligned_nesterov\(learning_rate\): \w+ must be positive, got 0",
        ),
        (
            lambda: asynchronous.aligned_nesterov(0.7, 1.0),
            ValueError,
            r"\(momentum\): \w+ must be in \[0, 1\), got 1.0",
        ),
        (
            lambda: asynchronous.aligned_nesterov(0.7, align=2),
            TypeError,
            r"\(align\): align must be callable, got 2",
        ),
    ],
)
def test_invalid_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
