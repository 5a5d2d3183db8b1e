"""Text of calls and arguments, the same in every process."""

import jax.numpy as jnp
import optax
import pytest

from localsgd_jax.core.call_names import call_name, value_name


@pytest.mark.parametrize(
    "value, name",
    [
        (optax.cosine_decay_schedule(1.0, 10), "cosine_decay_schedule"),
        (optax.scale(0.5), "scale"),
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
