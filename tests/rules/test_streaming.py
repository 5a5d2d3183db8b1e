"""Fragments: assignment of leaves, order of rounds and result of a synchronisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.rule_arrays import (
    K,
    random_rounds,
    set_params_algorithm,
    sync_arrays,
    sync_tree,
)

import localsgd_jax as lsgd
from localsgd_jax.rules.packed_results import pack, unpack, vector_sizes
from localsgd_jax.rules.streaming import _path_name, _slice, assign_fragments

TREES = {
    "many": [np.zeros(s, np.float32) for s in (7, 3, 5, 5, 2, 8, 1, 9, 4, 6)],
    "one large": [np.zeros((100, 3), np.float32), np.zeros(2, np.float32)],
    "scalars": [np.float32(0)] * 5,
    "mixed": {"w": np.zeros((6, 4), np.float16), "b": np.zeros(6, np.float32)},
}


def bytes_per_fragment(tree, groups):
    leaves = jax.tree.leaves(tree)

    def num_bytes(part):
        shape = jax.eval_shape(lambda leaf: _slice(leaf, part), leaves[part.leaf])
        return shape.size * shape.dtype.itemsize

    return [sum(map(num_bytes, group)) for group in groups]


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("split_axis", [None, 0])
def test_fragments_cover_the_tree_exactly_once(name, n, split_axis):
    tree = jax.tree.map(jnp.asarray, TREES[name])
    groups = assign_fragments(tree, n, split_axis=split_axis)
    counts = [np.zeros(leaf.shape, int) for leaf in jax.tree.leaves(tree)]
    for group in groups:
        for part in group:
            complete = part.axis is None
            counts[part.leaf][... if complete else slice(part.start, part.stop)] += 1
    assert all((count == 1).all() for count in counts)
    total = sum(x.nbytes for x in jax.tree.leaves(tree))
    assert sum(bytes_per_fragment(tree, groups)) == total


def test_rows_belong_to_the_fragment_of_their_midpoint():
    groups = assign_fragments([np.zeros((4, 2), np.float32)], 3, split_axis=0)
    bounds = [(part.start, part.stop) for (part,) in groups]
    assert bounds == [(0, 1), (1, 3), (3, 4)]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_fragments_are_balanced_if_the_leaves_allow(n):
    tree = [np.zeros(20 + i, np.float32) for i in range(60)]
    for split_axis in (None, 0):
        sizes = bytes_per_fragment(
            tree, assign_fragments(tree, n, split_axis=split_axis)
        )
        assert max(sizes) <= 1.1 * min(sizes)
    large = jax.tree.map(jnp.asarray, TREES["one large"])
    sizes = bytes_per_fragment(large, assign_fragments(large, n, split_axis=0))
    assert max(sizes) <= 1.1 * min(sizes)


def test_fragments_by_layer_and_by_user_function():
    tree = {
        "embed": jnp.zeros(9),
        "layers": [{"w": jnp.zeros(4), "b": jnp.zeros(1)} for _ in range(5)],
        "norm": jnp.zeros(2),
    }
    names = [_path_name(path) for path, _ in jax.tree.leaves_with_path(tree)]
    groups = assign_fragments(tree, 2, "layer")
    fragment_of = {
        names[part.leaf]: p for p, group in enumerate(groups) for part in group
    }
    assert [fragment_of[f"layers.{i}.w"] for i in range(5)] == [0, 1, 0, 1, 0]
    assert fragment_of["embed"] == 1 and fragment_of["norm"] == 0
    groups = assign_fragments(tree, 2, lambda name: int(name.startswith("layers")))
    assert [names[part.leaf] for part in groups[0]] == ["embed", "norm"]


@pytest.mark.parametrize("n, split_axis", [(3, None), (2, 0)])
def test_each_round_synchronises_exactly_one_fragment(n, split_axis):
    tree = {"a": jnp.zeros(5), "b": jnp.zeros(4), "c": jnp.zeros(3)}
    rule = lsgd.fragment(lsgd.average(), n, split_axis=split_axis)
    cluster = lsgd.simulate(set_params_algorithm(rule), K)
    state = cluster.init({"params": tree})
    rng = np.random.default_rng(0)
    touched = jax.tree.map(lambda x: np.zeros(x.shape, int), tree)
    for index in range(2 * n):
        x = {k: rng.normal(size=(K, v.size)).astype("f4") for k, v in tree.items()}
        state, _ = cluster.step(state, x)
        state = cluster.sync(state)
        for name, after in state.workers["params"].items():
            after = np.asarray(after)
            equal = (after == after[:1]).all(axis=0)
            np.testing.assert_allclose(
                after[:, equal], np.tile(x[name].mean(0)[equal], (K, 1)), atol=1e-6
            )
            np.testing.assert_array_equal(after[:, ~equal], x[name][:, ~equal])
            touched[name] += equal
        if index == n - 1:
            assert all((count == 1).all() for count in touched.values())
    assert all((count == 2).all() for count in touched.values())


def test_each_fragment_counts_its_own_rounds():
    """Every second round of each of two fragments: rounds 3 and 4, 7 and 8."""
    rule = lsgd.fragment(lsgd.when(lsgd.every(2), lsgd.average()), 2, split_axis=0)
    synced, _ = sync_arrays(rule, random_rounds(8))
    any_equal = (synced == synced[:, :1]).all(axis=1).any(axis=1)
    assert any_equal.tolist() == [False, False, True, True] * 2


def test_packed_results_of_several_dtypes():
    trees = [
        {"a": jnp.ones((2, 3)), "n": jnp.int32(4)},
        {"b": jnp.arange(4.0), "h": jnp.ones(2, jnp.bfloat16)},
    ]
    sizes = vector_sizes(trees)
    assert sizes == {"float32": 6, "int32": 1, "bfloat16": 2}
    for tree in trees:
        vectors = pack(tree, sizes)
        assert {name: x.size for name, x in vectors.items()} == sizes
        jax.tree.map(np.testing.assert_array_equal, unpack(vectors, tree), tree)


@pytest.mark.full
def test_traced_round_copies_only_a_fragment():
    """The conditional returns a fragment; donated leaves are updated in place."""
    size, n = 40_000, 4
    params = {f"layer{i}": jnp.zeros(size // 8) for i in range(8)}
    rule = lsgd.fragment(lsgd.diloco(), n)
    cluster = lsgd.simulate(set_params_algorithm(rule), 1)
    state = cluster.init({"params": params})
    program = jax.jit(cluster.sync, donate_argnums=0).lower(state).compile()
    # Values, anchor and momentum of a fragment, twice.
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary <= 2 * 3 * 4 * size / n


def test_one_fragment_equals_the_rule():
    expected, _ = sync_arrays(lsgd.diloco(), random_rounds())
    synced, _ = sync_arrays(lsgd.fragment(lsgd.diloco(), 1), random_rounds())
    np.testing.assert_array_equal(synced, expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: lsgd.fragment(lsgd.average(), 0),
            r"fragment\(n\): the number of fragments must be at least 1, got 0",
        ),
        (
            lambda: sync_tree(lsgd.fragment(lsgd.average(), 3)),
            r"fragment\(n\): each of the 3 fragments must get at least one of the 1 "
            r"leaves, got none for fragments \[1, 2\]",
        ),
        (
            lambda: lsgd.fragment(lsgd.average(), 2, grouping="size"),
            r'fragment\(grouping\): grouping must be "bytes", "layer" or a function, '
            r"got 'size'",
        ),
        (
            lambda: sync_tree(
                lsgd.fragment(lsgd.average(), 2, grouping=lambda name: 2)
            ),
            r"fragment\(grouping\): it must return a fragment from 0 to 1 for 'w', "
            r"got 2",
        ),
        (
            lambda: lsgd.fragment(lsgd.average(), 2, rounds_per_fragment=0),
            r"fragment\(rounds_per_fragment\): rounds_per_fragment must be at least 1, "
            r"got 0",
        ),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_leaf_of_two_rows_is_split():
    groups = assign_fragments([np.zeros((2, 3), np.float32)], 2, split_axis=0)
    assert [(part.start, part.stop) for (part,) in groups] == [(0, 1), (1, 2)]


def test_leaves_that_fit_or_lack_the_axis_are_not_split():
    tree = [np.float32(0), np.zeros(4, np.float32), np.zeros((4, 4), np.float32)]
    groups = assign_fragments(tree, 2, split_axis=1)
    assert [[part.leaf for part in group] for group in groups] == [[0, 1, 2], [2]]
    assert [part.axis for part in groups[0]] == [None, None, 1]
    balanced = assign_fragments([np.zeros((2, 2), np.float32)] * 2, 2, split_axis=0)
    assert [[part.axis for part in group] for group in balanced] == [[None], [None]]
