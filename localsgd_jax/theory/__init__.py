"""Stich's theorems on local SGD: one function per statement, constants included.

Stich, Local SGD Converges Fast and Communicates Little, ICLR 2019. In all of it f is
L-smooth and μ-strongly convex, and K workers sample from the same functions.
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
from localsgd_jax.theory.constants import Constants, Run, Terms
from localsgd_jax.theory.estimate import (
    curvature,
    estimate,
    logistic_curvature,
    quadratic_curvature,
)
from localsgd_jax.theory.lemmas import descent, drift, mean_variance, telescope
from localsgd_jax.theory.speedup import corrected_speedup, speedup

__all__ = [
    "AverageState",
    "Constants",
    "Run",
    "RunningAverage",
    "Terms",
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
