"""Text of calls and arguments, the same in every process."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from localsgd_jax.core.call_names import call_name, value_name


@pytest.mark.parametrize(
    "value, name",
    [
        (
            optax.cosine_decay_schedule(1.0, 10),
            "cosine_decay_schedule(alpha=0.0, decay_steps=10, exponent=1.0, "
            "init_value=1.0)",
        ),
        (optax.scale(0.5), "scale(step_size=0.5)"),
        (jnp.float32(0.5), "0.5"),
        (object(), "<object object>"),
        ("a\nb", r"'a\nb'"),
    ],
    ids=["schedule", "optimizer", "array", "object", "text"],
)
def test_value_name(value, name):
    assert value_name(value) == name


def test_call_name_omits_arguments_that_are_none():
    assert call_name("f", 1, axis=None, n=2) == "f(1, n=2)"


def scaled(x, factor):
    return x * factor


@pytest.mark.parametrize(
    "one, other",
    [
        (optax.sgd(0.1, 0.9), optax.sgd(7, 0.1)),
        (optax.adam(1e-3), optax.adam(1e-3, b2=0.9)),
        (optax.adam(1e-3), optax.adam(optax.constant_schedule(1e-3))),
        (
            optax.sgd(optax.linear_schedule(0.1, 0, 10)),
            optax.sgd(optax.linear_schedule(0.1, 0, 11)),
        ),
        (
            optax.chain(optax.clip(1.0), optax.sgd(0.1)),
            optax.chain(optax.clip(2.0), optax.sgd(0.1)),
        ),
        (lambda r: r % 2 == 0, lambda r: r % 3 == 0),
        (lambda r: r < 3, lambda r: r > 3),
        (functools.partial(scaled, factor=2), functools.partial(scaled, factor=3)),
        (
            functools.partial(scaled, factor=np.arange(3)),
            functools.partial(scaled, factor=np.arange(3)[::-1]),
        ),
    ],
)
def test_names_of_functions_hold_their_numbers(one, other):
    assert value_name(one) != value_name(other)
    assert value_name(one) == value_name(one)


def test_recursive_functions_and_empty_cells_have_names():
    def count(n):
        return n if n == 0 else count(n - 1) + later

    assert value_name(count).startswith("test_recursive_functions_and_empty_cells")
    later = 1
    assert "later=1" in value_name(count)


def test_long_names_end_with_a_digest():
    optimizers = [optax.chain(*[optax.scale(0.5)] * 50, optax.scale(x)) for x in (1, 2)]
    names = list(map(value_name, optimizers))
    assert names[0] != names[1] and max(map(len, names)) < 400
