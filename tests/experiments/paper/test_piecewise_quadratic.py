"""The piecewise quadratic problem, against a NumPy loop."""

import math

import jax
import numpy as np
import pytest
from harness.selection import keep

from localsgd_jax.experiments.paper import piecewise_quadratic
from localsgd_jax.theory import RunParameters


@pytest.mark.parametrize("batch", keep([1, 3, 8, 16, 32], [3]))
def test_rademacher_means_have_mean_zero_and_variance_one_over_b(batch):
    key = jax.random.key(0)
    means = piecewise_quadratic.rademacher_means(key, (200, 1000), batch)
    x = np.asarray(means, float)
    assert abs(x.mean()) < 5 / math.sqrt(batch * x.size)
    assert x.var() == pytest.approx(1 / batch, rel=0.02)
    ones = (x + 1) * batch / 2
    np.testing.assert_allclose(ones, ones.round(), atol=1e-5)
    assert ones.min() >= 0 and ones.max() <= batch


def test_estimated_gap_matches_manual_loop():
    run = RunParameters(workers=3, period=4, steps=30, batch=2)
    a, x = 49, np.zeros((3, 5))
    mean, total = np.zeros(5), 0.0
    for t in range(run.steps):
        weight = (a + t) ** 2
        total += weight
        mean += weight * x.mean(axis=0)
        key = jax.random.fold_in(jax.random.key(0), t)
        noise = np.asarray(piecewise_quadratic.rademacher_means(key, x.shape, 2))
        x = x - 4 / (a + t) * (np.where(x > 0, 1.0, 3.0) * x - noise)
        if (t + 1) % run.period == 0:
            x[:] = x.mean(axis=0)
    mean /= total
    gaps = np.where(mean > 0, 1.0, 3.0) / 2 * mean**2
    error = piecewise_quadratic.estimate_gap(run, dimension=5)
    assert error.mean == pytest.approx(gaps.mean(), rel=1e-4)
    assert error.standard_error == pytest.approx(gaps.std() / math.sqrt(5), rel=1e-4)
