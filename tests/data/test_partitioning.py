"""Partitions: disjoint shards with sampled label proportions, and their batches."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import localsgd_jax as lsgd


def heterogeneity(labels, shards):
    """Returns the mean L1 distance of label proportions to the overall ones."""
    kinds = np.unique(labels)
    overall = (labels[:, None] == kinds[None]).mean(0)
    local = [(labels[s][:, None] == kinds[None]).mean(0) for s in shards]
    return np.abs(np.array(local) - overall[None]).sum(1).mean()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9),
    st.floats(0.01, 100),
    st.lists(st.integers(0, 4), min_size=9, max_size=80),
    st.integers(0, 3),
)
def test_shards_are_disjoint_and_of_equal_size(workers, alpha, labels, seed):
    shards = lsgd.dirichlet_partition(np.array(labels), workers, alpha, seed=seed)
    assert [len(shard) for shard in shards] == [len(labels) // workers] * workers
    indices = np.concatenate(shards)
    assert len(np.unique(indices)) == len(indices) and indices.max() < len(labels)


def test_heterogeneity_decreases_with_alpha():
    labels = np.random.default_rng(0).integers(10, size=5000)
    distances = [
        heterogeneity(labels, lsgd.dirichlet_partition(labels, 8, alpha))
        for alpha in (0.1, 1, 10, 1e5)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 1 and distances[-1] < 0.2


def test_proportions_follow_the_dirichlet_distribution():
    """Checks E[q] = p and Var[q] = p (1 − p) / (alpha + 1) over many draws."""
    labels = np.repeat([0, 1], [700, 300])
    draws = [
        (labels[lsgd.dirichlet_partition(labels, 20, 3.0, seed=seed)[0]] == 1).mean()
        for seed in range(400)
    ]
    assert abs(np.mean(draws) - 0.3) < 0.04
    expected = 0.3 * 0.7 / 4 + 0.3 * 0.7 * 3 / 4 / 50  # and of 50 examples drawn
    assert abs(np.var(draws) - expected) < 0.2 * expected


def test_each_epoch_of_a_worker_is_its_shard():
    shards = [np.array([0, 1, 2, 3]), np.array([7, 8])]
    data = {"x": np.arange(9), "y": np.arange(9) * 10}
    batches = list(itertools.islice(lsgd.partitioned_batches(data, shards, 2), 6))
    rows = np.array([batch["x"] for batch in batches])
    assert jax.tree.map(np.shape, batches[0]) == {"x": (2, 2), "y": (2, 2)}
    np.testing.assert_array_equal([batch["y"] for batch in batches], rows * 10)
    for epoch in range(3):
        first = rows[2 * epoch : 2 * epoch + 2, 0].ravel()
        assert sorted(first) == [0, 1, 2, 3]
    for step in range(6):
        assert sorted(rows[step, 1]) == [7, 8]
    assert len({tuple(row) for row in rows[:, 1].tolist()}) == 2


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_resuming_continues_the_streams(steps):
    shards = [np.arange(5), np.arange(5, 12)]
    batches = list(
        itertools.islice(lsgd.partitioned_batches(np.arange(12), shards, 3), 9)
    )
    resumed = lsgd.partitioned_batches(
        np.arange(12), shards, 3, examples_seen=steps * 6
    )
    for left, right in zip(batches[steps:], resumed, strict=False):
        np.testing.assert_array_equal(left, right)


def test_seeds_differ():
    labels = np.arange(100) % 5
    first, second = (
        lsgd.dirichlet_partition(labels, 4, 1.0, seed=seed) for seed in (0, 1)
    )
    assert not np.array_equal(np.sort(first[0]), np.sort(second[0]))
    streams = [
        lsgd.partitioned_batches(labels, first, 25, seed=seed) for seed in (0, 0, 1)
    ]
    one, same, other = map(next, streams)
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: lsgd.dirichlet_partition(np.zeros(9), 0, 1.0),
            r"workers must be at least 1",
        ),
        (
            lambda: lsgd.dirichlet_partition(np.zeros(9), 3, 0),
            r"alpha must be positive, got 0",
        ),
        (
            lambda: lsgd.dirichlet_partition(np.zeros(2), 3, 1.0),
            r"3 workers, got shape \(2,\)",
        ),
        (
            lambda: lsgd.dirichlet_partition(np.zeros((9, 2)), 3, 1.0),
            r"got shape \(9, 2\)",
        ),
        (
            lambda: lsgd.partitioned_batches(np.zeros(3), [], 1),
            r"at least one shard is needed",
        ),
        (
            lambda: lsgd.partitioned_batches(
                np.zeros(3), [np.array([0]), np.array([])], 1
            ),
            r"got int64\[0\] for worker 1",
        ),
        (
            lambda: lsgd.partitioned_batches(np.zeros(3), [np.array([3])], 1),
            r"array of indices in \[0, 3\)",
        ),
        (
            lambda: lsgd.partitioned_batches(np.zeros(3), [np.array([0])], 0),
            r"batch must be",
        ),
        (
            lambda: lsgd.partitioned_batches(
                np.zeros(3), [np.arange(3)] * 2, 2, examples_seen=6
            ),
            r"a multiple of the 2 \* 2 examples of a step, got 6",
        ),
        (
            lambda: lsgd.partitioned_batches((np.zeros(3), np.zeros(4)), [[0]], 1),
            r"partitioned_batches\(data\)",
        ),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_worker_subset():
    shards = [np.arange(3), np.arange(3, 9), np.arange(9, 12)]
    all_batches = lsgd.partitioned_batches(np.arange(12), shards, 2)
    subset = lsgd.partitioned_batches(np.arange(12), shards, 2, local_workers=[2, 0])
    for _ in range(5):
        np.testing.assert_array_equal(next(subset), next(all_batches)[[2, 0]])
    message = r"partitioned_batches\(local_workers\): local_workers must be a non-empty"
    with pytest.raises(ValueError, match=message):
        lsgd.partitioned_batches(np.arange(12), shards, 2, local_workers=[3])


@pytest.mark.parametrize("labels", [[0.0, np.nan, 1.0, 1.0], [0.3, 0.2, 1.0, 1.0]])
@pytest.mark.parametrize("indices", [[0.5, 1.0], [True, False]])
def test_labels_and_indices_of_wrong_type_raise(labels, indices):
    with pytest.raises(TypeError, match=r"dirichlet_partition\(labels\): .* float64"):
        lsgd.dirichlet_partition(np.array(labels), 2, 1.0)
    with pytest.raises(TypeError, match=r"partitioned_batches\(shards\): .* ints"):
        lsgd.partitioned_batches(np.arange(6), [np.array(indices)], 1)
