"""Exponential moving average of the synchronised parameters."""

import numpy as np
import pytest
from harness.rule_arrays import (
    N,
    random_rounds,
    sync_arrays,
    with_and_without_weights,
)

import localsgd_jax as lsgd


@with_and_without_weights
def test_ema_of_the_synchronised_parameters(weights):
    start = np.arange(N)
    rule = lsgd.ema(lsgd.diloco(), 0.8)
    synced, state = sync_arrays(rule, random_rounds(), weights, start=start)
    expected, _ = sync_arrays(lsgd.diloco(), random_rounds(), weights, start=start)
    np.testing.assert_array_equal(synced, expected)
    ema = np.arange(N, dtype=float)
    for x in synced:
        ema = 0.8 * ema + 0.2 * x[0]
    np.testing.assert_allclose(state.shared["params"].ema, ema, rtol=1e-5, atol=1e-6)


def test_invalid_decay_raises():
    message = r"ema\(decay\): decay must be in \[0, 1\), got 1.0"
    with pytest.raises(ValueError, match=message):
        lsgd.ema(lsgd.average(), 1.0)
