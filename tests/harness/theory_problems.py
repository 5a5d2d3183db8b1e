"""Problems with known constants for the tests of the theory.

In each coordinate, f(x) = ½dx² with d = d₊ above 0 and d₋ below, and ∇fᵢ(x) = dx − sξ
with a random sign ξ. f is quadratic unless d₊ ≠ d₋; only then do local steps change the
trajectory of the workers' mean.
"""

from typing import NamedTuple

import numpy as np

from localsgd_jax.theory import Constants, RunParameters

ONES = Constants(mu=1.0, smoothness=1.0, variance=1.0, second_moment=1.0)
UNEVEN = Constants(mu=0.5, smoothness=3.0, variance=7.0, second_moment=11.0)
RUN = RunParameters(workers=4, period=4, steps=100)


class Problem(NamedTuple):
    """A problem, with its constants.

    Attributes:
      constants: μ, L, σ² and G².
      slopes: d₋ and d₊, `(2, d)`.
      noise: s, `(d,)`.
      x0: x₀, `(d,)`.
    """

    constants: Constants
    slopes: np.ndarray
    noise: np.ndarray
    x0: np.ndarray

    @property
    def distance(self):
        return float(np.sum(self.x0**2))

    def slope(self, x):
        return np.where(x > 0, self.slopes[1], self.slopes[0])

    def gradient(self, x, signs):
        return self.slope(x) * x - self.noise * signs

    def error(self, x):
        return np.mean(np.sum(self.slope(x) * x**2, axis=-1)) / 2


def make_problem(below, above, noise, x0):
    """Returns a problem with its exact constants.

    They use that |x| never exceeds max(|x₀|, s/min d), since η ≤ 1/L.
    """
    slopes, noise, x0 = np.array([below, above]), np.array(noise), np.array(x0)
    variance = float(np.sum(noise**2))
    reach = np.maximum(np.abs(x0), noise / slopes.min(0))
    second_moment = float(np.sum((slopes.max(0) * reach) ** 2)) + variance
    mu, smoothness = float(slopes.min()), float(slopes.max())
    constants = Constants(mu, smoothness, variance, second_moment)
    return Problem(constants, slopes, noise, x0)


PROBLEMS = {
    "isotropic": make_problem([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.1, -0.05]),
    "anisotropic": make_problem([0.5, 2.0], [0.5, 2.0], [0.5, 2.0], [0.3, 0.1]),
    "distant": make_problem([0.5, 2.0], [0.5, 2.0], [0.05, 0.2], [-5.0, 5.0]),
    "noiseless": make_problem([0.5, 2.0], [0.5, 2.0], [0.0, 0.0], [1.0, 1.0]),
    "piecewise": make_problem([0.5, 1.0], [2.0, 1.0], [3.0, 1.0], [0.1, 0.1]),
}
