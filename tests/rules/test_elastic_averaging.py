"""Elastic averaging and interpolation against NumPy in float64."""

import numpy as np
import pytest
from harness.rule_arrays import (
    N,
    random_rounds,
    sync_arrays,
    weighted_mean,
    weights_of_round,
    with_and_without_weights,
)

import localsgd_jax as lsgd


@with_and_without_weights
def test_elastic_average(weights):
    rule = lsgd.elastic_average(0.2, 0.6)
    synced, state = sync_arrays(rule, random_rounds(), weights)
    centre = np.zeros(N)
    for i, x in enumerate(random_rounds()):
        w = weights_of_round(weights, i)
        expected = np.where(w[:, None] > 0, x - 0.2 * (x - centre), centre)
        centre = centre + 0.6 * (weighted_mean(x, w) - centre)
        np.testing.assert_allclose(synced[i], expected, atol=1e-6)
    np.testing.assert_allclose(state.shared["params"], centre, atol=1e-6)


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_interpolate(alpha):
    synced, _ = sync_arrays(lsgd.interpolate(lsgd.average(), alpha), random_rounds())
    x = random_rounds()
    expected = alpha * x + (1 - alpha) * x.mean(1, keepdims=True)
    np.testing.assert_allclose(synced, expected, atol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: lsgd.elastic_average(alpha=1.5),
            r"elastic_average\(alpha\): alpha must be in \[0, 1\], got 1.5",
        ),
        (
            lambda: lsgd.interpolate(lsgd.average(), -0.1),
            r"interpolate\(alpha\): alpha must be in \[0, 1\], got -0.1",
        ),
    ],
)
def test_invalid_weights_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
