"""Bounds and lemmas of Stich 2019, one function per statement.

All constants are included. Stich, Local SGD Converges Fast and Communicates Little,
ICLR 2019. Throughout, f is L-smooth and μ-strongly convex, and all K workers sample
from the same functions.
"""

from localsgd_jax.theory.averages import (
    AverageState,
    RunningAverage,
    running_average,
    shift,
    stepsize,
    weight_sum,
    weights,
)
from localsgd_jax.theory.bounds import (
    asynchronous_bound,
    bound,
    longest_period,
    one_shot_bound,
    rate,
)
from localsgd_jax.theory.constants import BoundTerms, Constants, RunParameters
from localsgd_jax.theory.estimation import (
    curvature,
    estimate,
    logistic_curvature,
    quadratic_curvature,
)
from localsgd_jax.theory.lemmas import descent, drift, mean_variance, telescope
from localsgd_jax.theory.speedup_models import corrected_speedup, speedup

__all__ = [
    "AverageState",
    "Constants",
    "RunParameters",
    "RunningAverage",
    "BoundTerms",
    "asynchronous_bound",
    "bound",
    "corrected_speedup",
    "curvature",
    "descent",
    "drift",
    "estimate",
    "logistic_curvature",
    "longest_period",
    "mean_variance",
    "one_shot_bound",
    "quadratic_curvature",
    "rate",
    "running_average",
    "shift",
    "speedup",
    "stepsize",
    "telescope",
    "weight_sum",
    "weights",
]
