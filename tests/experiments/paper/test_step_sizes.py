"""The step-size grid of the paper."""

import numpy as np
import pytest

from localsgd_jax.experiments.paper.step_sizes import learning_rate, step_sizes

EXAMPLES = 1797


@pytest.mark.parametrize("step", [0, 1, 99])
def test_learning_rates_match_the_paper(step):
    sizes = step_sizes(range(-9, 3))
    expected = [32 * 2.0**i for i in range(-9, 3)]
    expected += [min(32, 2.0**i * EXAMPLES / (step + 1)) for i in range(-9, 3)]
    rates = learning_rate(sizes, step, EXAMPLES)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
