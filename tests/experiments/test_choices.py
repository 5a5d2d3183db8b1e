"""Optimizers and learning rates by their command-line names."""

import numpy as np
import optax
import pytest
from harness.selection import keep

from localsgd_jax.experiments import choices


def test_default_learning_rates():
    assert choices.peak_learning_rate("sgd", 3.0) == 2.0
    assert choices.peak_learning_rate("momentum", 3.0) == pytest.approx(0.2)
    assert choices.peak_learning_rate("adam", 3.0) == 0.05


def test_learning_rate_decreases_to_zero():
    rate = choices.linear_decay(2.0, 8)
    np.testing.assert_allclose([rate(t) for t in (0, 2, 8, 9)], [2, 1.5, 0, 0])


@pytest.mark.parametrize("name", keep(choices.OPTIMIZERS, ["momentum"]))
def test_optimizers_match_optax(name):
    expected = {
        "sgd": optax.sgd(0.1),
        "momentum": optax.sgd(0.1, momentum=0.9),
        "adam": optax.adam(0.1),
        "adamw": optax.adamw(0.1),
    }[name]
    x = np.array([1.0, 2.0], np.float32)
    optimizer = choices.OPTIMIZERS[name](0.1)
    states = [optimizer.init(x), expected.init(x)]
    for _ in range(2):
        (a, states[0]), (b, states[1]) = (
            one.update(x, state, x)
            for one, state in zip((optimizer, expected), states, strict=True)
        )
        np.testing.assert_array_equal(a, b)
