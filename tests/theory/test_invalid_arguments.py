"""Invalid arguments of the theory raise with call, rule and value."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from harness.theory_problems import ONES, RUN

from localsgd_jax import theory


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.stepsize(0, 17), "stepsize(mu): mu must be positive, got 0"),
        (lambda: theory.stepsize(math.nan, 17), "mu must be positive, got nan"),
        (lambda: theory.stepsize(1, 1), "stepsize(a): a must be above 1, got 1"),
        (
            lambda: theory.shift(1, 0.5, 1),
            "mu must be at most smoothness, got 1 and 0.5",
        ),
        (
            lambda: theory.shift(1, 1, 0),
            "shift(period): period must be at least 1, got 0",
        ),
        (lambda: theory.shift(1, 1, 1, -1), "delay must be at least 0, got -1"),
        (lambda: theory.weights(0), "weights(a): a must be positive, got 0"),
        (lambda: theory.weights(1, -1), "power must be at least 0, got -1"),
        (lambda: theory.weight_sum(0, 17), "steps must be at least 1, got 0"),
        (lambda: theory.weight_sum(1, 0.5), "a must be at least 1, got 0.5"),
        (
            lambda: theory.descent(1, 1, 1, 1, 0.2, 1, 2),
            "learning_rate must be at most 1/(4 smoothness) = 0.125, got 0.2",
        ),
        (lambda: theory.mean_variance(1.0, 0), "workers must be at least 1, got 0"),
        (lambda: theory.mean_variance(1.0, 1, 0), "batch must be at least 1, got 0"),
        (lambda: theory.drift(0.1, 1.0, 0), "drift(period): period must be at least 1"),
        (lambda: theory.telescope(1, 1, 1, mu=0, steps=1, a=2), "mu must be positive"),
        (
            lambda: theory.telescope(1, 1, 1, mu=1, steps=1, a=1),
            "a must be above 1, got 1",
        ),
        (
            lambda: theory.longest_period(ONES._replace(second_moment=0.0), RUN, 17),
            "second_moment must be positive, got 0.0",
        ),
        (lambda: theory.speedup(0, 1, 1), "workers must be at least 1, got 0"),
        (lambda: theory.speedup(1, 1, -1), "ratio must be at least 0, got -1"),
        (lambda: theory.corrected_speedup(1, 0, 1), "period must be at least 1, got 0"),
        (lambda: theory.corrected_speedup(1, 1, 1, -1), "accuracy must be at least 0"),
        (
            lambda: theory.asynchronous_bound(ONES, RUN, 1.0, 17, delay=13),
            "a must exceed max(16 kappa, H) = 17, got 17",
        ),
        (
            lambda: theory.asynchronous_bound(ONES, RUN, 1.0, 999, delay=97),
            "period + delay must be at most steps = 100, got 4 and 97",
        ),
        (
            lambda: theory.asynchronous_bound(ONES, RUN, 1.0, 17, delay=-1),
            "delay must be at least 0, got -1",
        ),
        (
            lambda: theory.one_shot_bound(ONES, RUN, 1.0, 100),
            "a must exceed max(16 kappa, H) = 100, got 100",
        ),
        (lambda: theory.logistic_curvature(np.eye(2), 0), "penalty must be positive"),
        (lambda: theory.quadratic_curvature(np.diag([1, 0])), "positive definite"),
        (lambda: theory.quadratic_curvature([[1, 1], [0, 1]]), "must be symmetric"),
        (lambda: theory.estimate(abs, 1, [], 1.0, 1.0), "at least 1 point, got 0"),
        (lambda: theory.estimate(abs, 1, [1], 2.0, 1.0), "got 2.0 and 1.0"),
        (lambda: theory.curvature(abs, 1, []), "at least 1 point, got 0"),
        (
            lambda: theory.curvature(lambda x, _: x**0.5, jnp.ones(2), [-1.0]),
            "its Hessian must be finite, got nan",
        ),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize("statement", ["bound", "rate", "asynchronous_bound"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": 0.0}, "(mu): mu must be positive, got 0.0"),
        (
            {"mu": 2.0},
            "(mu, smoothness): mu must be at most smoothness, got 2.0 and 1.0",
        ),
        ({"variance": -1.0}, "(variance): variance must be at least 0, got -1.0"),
        ({"second_moment": -1.0}, "second_moment must be at least 0, got -1.0"),
        ({"workers": 0}, "(workers): workers must be at least 1, got 0"),
        ({"period": 0}, "(period): period must be at least 1, got 0"),
        ({"steps": 0}, "(steps): steps must be at least 1, got 0"),
        ({"batch": 0}, "(batch): batch must be at least 1, got 0"),
        ({"steps": 3}, "(period, steps): period must be at most steps, got 4 and 3"),
    ],
)
def test_invalid_constants_raise(statement, changes, message):
    def changed(table):
        return table._replace(
            **{k: v for k, v in changes.items() if k in table._fields}
        )

    arguments = {"bound": (1.0, 17), "rate": (), "asynchronous_bound": (1.0, 17, 1)}
    with pytest.raises(ValueError) as error:
        getattr(theory, statement)(changed(ONES), changed(RUN), *arguments[statement])
    assert str(error.value).startswith(statement) and message in str(error.value)


@pytest.mark.parametrize(
    ("period", "a"), [(4, 16), (20, 20), (20, 19.5), (4, math.nan)]
)
def test_small_shift_raises(period, a):
    least = max(16.0, period)
    message = f"bound(a): a must exceed max(16 kappa, H) = {least}, got {a}"
    if math.isnan(a):
        message = "bound(a): a must be finite, got nan"
    with pytest.raises(ValueError) as error:
        theory.bound(ONES, RUN._replace(period=period), 1.0, a)
    assert str(error.value) == message


def test_negative_distance_raises():
    with pytest.raises(
        ValueError, match=r"bound\(distance\): distance must be at least"
    ):
        theory.bound(ONES, RUN, -1.0, 17)
