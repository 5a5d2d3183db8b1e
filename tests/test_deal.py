"""Dealing: each epoch exactly once, whatever K is, from any position."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import localsgd_jax as lsgd

numbers = st.integers(1, 7)


def dealt(count, workers, batch, seed=0, start=0, steps=10):
    stream = lsgd.deal(np.arange(count), workers, batch, seed=seed, start=start)
    return np.array(list(itertools.islice(stream, steps)))


@settings(deadline=None, max_examples=60)
@given(numbers, numbers, st.integers(0, 30), st.integers(0, 3))
def test_every_epoch_is_dealt_exactly_once(workers, batch, extra, seed):
    count = workers * batch + extra
    steps = -(-3 * count // (workers * batch))
    stream = dealt(count, workers, batch, seed, steps=steps)
    assert stream.shape == (steps, workers, batch)
    for epoch in range(3):
        cards = stream.ravel()[epoch * count : (epoch + 1) * count]
        np.testing.assert_array_equal(np.sort(cards), np.arange(count))


@settings(deadline=None, max_examples=60)
@given(numbers, numbers, numbers, numbers, st.integers(0, 9))
def test_resuming_with_other_workers_repeats_and_loses_nothing(k, b, k2, b2, steps):
    count = 50
    whole = dealt(count, 1, 1, steps=600).ravel()
    before = dealt(count, k, b, steps=steps).ravel() if steps else np.array([], int)
    after = dealt(count, k2, b2, start=steps * k * b, steps=3).ravel()
    joined = np.concatenate([before, after])
    np.testing.assert_array_equal(joined, whole[: len(joined)])


def test_worker_k_gets_the_kth_hand():
    stream = dealt(20, 1, 1, steps=20).ravel()
    np.testing.assert_array_equal(dealt(20, 4, 2, steps=2).ravel()[:16], stream[:16])


def test_epochs_and_seeds_differ():
    first, second = dealt(40, 4, 10, steps=2)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, dealt(40, 4, 10, seed=1, steps=1)[0])
    np.testing.assert_array_equal(first, dealt(40, 4, 10, steps=1)[0])


def test_leaves_stay_together():
    data = {"x": np.arange(12).reshape(6, 2), "y": (np.arange(6), np.arange(6) * 10)}
    batch = next(lsgd.deal(data, workers=3, batch=2))
    assert jax.tree.map(np.shape, batch) == {"x": (3, 2, 2), "y": ((3, 2), (3, 2))}
    np.testing.assert_array_equal(batch["x"][..., 0], 2 * batch["y"][0])
    np.testing.assert_array_equal(batch["y"][1], 10 * batch["y"][0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch": 4}, r"shard of 10 // 3 = 3 examples, got 4"),
        ({"batch": 0}, r"deal\(batch\): \w+ must be at least 1, got 0"),
        ({"workers": 0}, r"deal\(workers\): \w+ must be at least 1, got 0"),
        ({"seed": -1}, r"deal\(seed\): seed must be at least 0, got -1"),
        ({"start": -1}, r"deal\(start\): start must be at least 0, got -1"),
        ({"data": (np.ones(3), np.ones(4))}, r"same number of examples"),
        ({"data": np.ones((0, 3))}, r"at least one"),
        ({"data": np.float32(1)}, r"leading axis"),
    ],
)
def test_bad_input(arguments, message):
    arguments = {"data": np.arange(10), "workers": 3, "batch": 2} | arguments
    with pytest.raises(ValueError, match=message):
        lsgd.deal(**arguments)


def test_only_some_workers_are_dealt_their_own():
    data = np.arange(24)
    whole = lsgd.deal(data, workers=4, batch=2)
    part = lsgd.deal(data, workers=4, batch=2, only=[1, 3])
    for _ in range(5):
        np.testing.assert_array_equal(next(part), next(whole)[[1, 3]])


@pytest.mark.parametrize("only", [[], [4], [-1], [[0]], [1, 1], [0.5], ["a"]])
def test_workers_that_are_not_there_get_nothing(only):
    with pytest.raises(ValueError, match=r"deal\(only\): at least one of the workers"):
        lsgd.deal(np.arange(24), workers=4, batch=2, only=only)


@pytest.mark.parametrize("only", [[0.0, 1.0], [True, False], np.array([1.0])])
def test_workers_are_whole_numbers(only):
    with pytest.raises(TypeError, match=r"deal\(only\): workers must be ints, got"):
        lsgd.deal(np.arange(24), workers=4, batch=2, only=only)
