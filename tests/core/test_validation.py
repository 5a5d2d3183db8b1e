"""Argument validation: messages with call, rule and value; NaN satisfies no rule."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localsgd_jax.core import validation

CALL = "call(x)"


@pytest.mark.parametrize(
    "function, error, message",
    [
        (
            lambda: validation.check(False, CALL, "x must be less than y", 3, 2),
            ValueError,
            "call(x): x must be less than y, got 3 and 2",
        ),
        (
            lambda: validation.check_number("call(y)", "y", math.nan, at_least=1),
            ValueError,
            "call(y): y must be at least 1, got nan",
        ),
        (
            lambda: validation.check_int(CALL, "x", True, 0),
            TypeError,
            "call(x): x must be an int, got True",
        ),
        (
            lambda: validation.check_int(CALL, "x", 1, 2),
            ValueError,
            "call(x): x must be at least 2, got 1",
        ),
        (
            lambda: validation.check_number(CALL, "x", "1", above=0),
            TypeError,
            "call(x): x must be a real number, got '1'",
        ),
        (
            lambda: validation.check_number(CALL, "x", math.inf, above=0),
            ValueError,
            "call(x): x must be finite, got inf",
        ),
        (
            lambda: validation.check_number(CALL, "x", math.nan, at_least=0, at_most=1),
            ValueError,
            "call(x): x must be in [0, 1], got nan",
        ),
        (
            lambda: validation.check_worker_axis(CALL, [np.ones((2, 3))], 4, 1, 2),
            ValueError,
            "call(x): the second axis of every leaf must be the 4 workers or the 2 of "
            "this process, got shape (2, 3) at [0]",
        ),
        (
            lambda: validation.check_weights(np.array([1.0, -1.0]), 2),
            ValueError,
            "sync(state, weight): a weight must be 0 or in [1e-20, 1e+20], got -1.0 "
            "for worker 1",
        ),
    ],
)
def test_messages_name_call_rule_and_value(function, error, message):
    with pytest.raises(error) as raised:
        function()
    assert str(raised.value) == message


def test_valid_arguments_are_returned():
    assert validation.check_int(CALL, "x", np.int32(3), 3) == 3
    assert validation.check_number(CALL, "x", np.float32(2), above=0) == 2.0
    assert validation.check_weights(None, 2) is None
    validation.check_worker_axis(CALL, np.ones((2, 3)), workers=4, local_workers=2)


def test_traced_weights_are_checked_by_shape_only():
    check = jax.jit(lambda weights: validation.check_weights(weights, 2))
    np.testing.assert_array_equal(check(jnp.array([-1.0, 1.0])), [-1.0, 1.0])
    with pytest.raises(ValueError, match=r"must have shape \(2,\).*got \(3,\)"):
        check(jnp.ones(3))
