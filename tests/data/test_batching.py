"""Shuffled batches: each epoch is a permutation, for any K and starting position."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import localsgd_jax as lsgd

small_ints = st.integers(1, 7)


def take_batches(count, workers, batch, seed=0, examples_seen=0, steps=10):
    batches = lsgd.shuffled_batches(
        np.arange(count), workers, batch, seed=seed, examples_seen=examples_seen
    )
    return np.array(list(itertools.islice(batches, steps)))


@settings(deadline=None, max_examples=60)
@given(small_ints, small_ints, st.integers(0, 30), st.integers(0, 3))
def test_each_epoch_is_a_permutation(workers, batch, extra, seed):
    count = workers * batch + extra
    steps = -(-3 * count // (workers * batch))
    stream = take_batches(count, workers, batch, seed, steps=steps)
    assert stream.shape == (steps, workers, batch)
    for epoch in range(3):
        indices = stream.ravel()[epoch * count : (epoch + 1) * count]
        np.testing.assert_array_equal(np.sort(indices), np.arange(count))


@settings(deadline=None, max_examples=60)
@given(small_ints, small_ints, small_ints, small_ints, st.integers(0, 9))
def test_resuming_with_other_sizes_continues_the_stream(k, b, k2, b2, steps):
    count = 50
    stream = take_batches(count, 1, 1, steps=600).ravel()
    before = (
        take_batches(count, k, b, steps=steps).ravel() if steps else np.array([], int)
    )
    after = take_batches(count, k2, b2, examples_seen=steps * k * b, steps=3).ravel()
    joined = np.concatenate([before, after])
    np.testing.assert_array_equal(joined, stream[: len(joined)])


def test_worker_slices():
    stream = take_batches(20, 1, 1, steps=20).ravel()
    np.testing.assert_array_equal(
        take_batches(20, 4, 2, steps=2).ravel()[:16], stream[:16]
    )


def test_epochs_and_seeds_differ():
    first, second = take_batches(40, 4, 10, steps=2)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, take_batches(40, 4, 10, seed=1, steps=1)[0])
    np.testing.assert_array_equal(first, take_batches(40, 4, 10, steps=1)[0])


def test_leaves_are_shuffled_alike():
    data = {"x": np.arange(12).reshape(6, 2), "y": (np.arange(6), np.arange(6) * 10)}
    batch = next(lsgd.shuffled_batches(data, workers=3, batch=2))
    assert jax.tree.map(np.shape, batch) == {"x": (3, 2, 2), "y": ((3, 2), (3, 2))}
    np.testing.assert_array_equal(batch["x"][..., 0], 2 * batch["y"][0])
    np.testing.assert_array_equal(batch["y"][1], 10 * batch["y"][0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch": 4}, r"part of 10 // 3 = 3 examples, got 4"),
        ({"batch": 0}, r"shuffled_batches\(batch\): batch must be at least 1, got 0"),
        (
            {"workers": 0},
            r"shuffled_batches\(workers\): workers must be at least 1, got 0",
        ),
        ({"seed": -1}, r"shuffled_batches\(seed\): seed must be at least 0, got -1"),
        (
            {"examples_seen": -1},
            r"shuffled_batches\(examples_seen\): examples_seen must be at least 0, "
            r"got -1",
        ),
        ({"data": (np.ones(3), np.ones(4))}, r"same number of examples"),
        ({"data": np.ones((0, 3))}, r"at least one"),
        ({"data": np.float32(1)}, r"leading axis"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    arguments = {"data": np.arange(10), "workers": 3, "batch": 2} | arguments
    with pytest.raises(ValueError, match=message):
        lsgd.shuffled_batches(**arguments)


def test_worker_subset():
    data = np.arange(24)
    all_batches = lsgd.shuffled_batches(data, workers=4, batch=2)
    subset = lsgd.shuffled_batches(data, workers=4, batch=2, local_workers=[1, 3])
    for _ in range(5):
        np.testing.assert_array_equal(next(subset), next(all_batches)[[1, 3]])


@pytest.mark.parametrize("subset", [[], [4], [-1], [[0]], [1, 1]])
def test_invalid_worker_subset_raises(subset):
    message = (
        r"shuffled_batches\(local_workers\): local_workers must be a non-empty list of "
        r"distinct indices in \[0, 4\), got"
    )
    with pytest.raises(ValueError, match=message):
        lsgd.shuffled_batches(np.arange(24), workers=4, batch=2, local_workers=subset)


@pytest.mark.parametrize(
    "subset", [[0.5], ["a"], [0.0, 1.0], [True, False], np.array([1.0])]
)
def test_worker_subset_of_wrong_type_raises(subset):
    message = r"shuffled_batches\(local_workers\): local_workers must be ints, got"
    with pytest.raises(TypeError, match=message):
        lsgd.shuffled_batches(np.arange(24), workers=4, batch=2, local_workers=subset)
