"""Batches of a plain loop, split over the workers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localsgd_jax as lsgd


class Tensor:
    """A tensor that may require gradients."""

    def __init__(self, values, needs_detach=False):
        self.values, self.needs_detach = np.asarray(values), needs_detach

    def detach(self):
        return Tensor(self.values)

    def __array__(self, dtype=None, copy=None):
        if self.needs_detach:
            raise RuntimeError("requires grad")
        return self.values


def test_arrays_keys_and_numbers():
    x = np.arange(24.0).reshape(8, 3)
    batch = {
        "x": x,
        "y": (jnp.arange(8), Tensor(np.arange(8), needs_detach=True)),
        "key": jax.random.key(0),
        "raw": jax.random.PRNGKey(0),
        "count": 3,
        "none": None,
    }
    parts = lsgd.split_batch(batch, 4)
    np.testing.assert_array_equal(parts["x"], x.reshape(4, 2, 3))
    for y in parts["y"]:
        np.testing.assert_array_equal(y, np.arange(8).reshape(4, 2))
    assert parts["key"].shape == (4,) and parts["raw"].shape == (4, 2)
    assert len(np.unique(jax.random.key_data(parts["key"]), axis=0)) == 4
    assert len(np.unique(parts["raw"], axis=0)) == 4
    np.testing.assert_array_equal(parts["count"], [3] * 4)
    assert parts["none"] is None


def test_the_remainder_raises_or_is_dropped():
    with pytest.raises(ValueError, match=r"leaf \['x'\] must have a multiple of the 4"):
        lsgd.split_batch({"x": np.ones((7, 2))}, 4)
    parts = lsgd.split_batch(np.arange(7), 3, drop_remainder=True)
    np.testing.assert_array_equal(parts, [[0, 1], [2, 3], [4, 5]])
    with pytest.raises(ValueError, match="multiple of the 4 workers"):
        lsgd.split_batch(np.ones(3), 4, drop_remainder=True)


def test_arrays_of_different_lengths_raise():
    message = r"same number of examples, got 8 in \['x'\] and 4 in \['y'\]"
    with pytest.raises(ValueError, match=message):
        lsgd.split_batch({"x": np.ones((8, 2)), "y": np.ones(4)}, 2)


def test_two_labels_are_no_key():
    labels = np.array([3, 5], np.uint32)
    np.testing.assert_array_equal(lsgd.split_batch(labels, 2), [[3], [5]])


@pytest.mark.parametrize(
    "leaf", ["text", object(), np.array(["a"]), np.zeros(4, "M8[s]")]
)
def test_other_leaves_raise(leaf):
    with pytest.raises(TypeError, match=r"\['x'\] must be an array or a number"):
        lsgd.split_batch({"x": leaf}, 2)


def test_arrays_of_dlpack_only():
    class OnlyDlpack:
        def __init__(self, values):
            self.values = values

        def __array__(self, dtype=None, copy=None):
            raise TypeError("bfloat16")

        def __dlpack__(self, **kwargs):
            return self.values.__dlpack__()

        def __dlpack_device__(self):
            return self.values.__dlpack_device__()

    parts = lsgd.split_batch(OnlyDlpack(np.arange(6, dtype=np.float32)), 3)
    np.testing.assert_array_equal(parts, np.arange(6.0).reshape(3, 2))
