"""Compressed means against NumPy in float64, and the bytes that they send."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import assert_close, mesh
from harness.rule_arrays import (
    K,
    N,
    random_rounds,
    set_params_algorithm,
    sync_arrays,
    weighted_mean,
    weights_of_round,
    with_and_without_weights,
)
from harness.selection import in_full, keep

import localsgd_jax as lsgd
from localsgd_jax.core import pieces
from localsgd_jax.rules import compression
from localsgd_jax.rules.codecs import BITS

SIZE = 2**17  # Parameters of the programs whose bytes are counted.


def quantize_rows(x, bits, block):
    """Returns rows (…, m) quantised to b-bit integers per block, in float64."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    if bits == 1:
        scale = np.abs(blocks).mean(axis=-1, keepdims=True)
        return (np.where(blocks >= 0, 1, -1) * scale).reshape(x.shape)
    largest = 2 ** (bits - 1) - 1
    scale = np.abs(blocks).max(axis=-1, keepdims=True)
    safe = np.where(scale > 0, scale, 1)
    codes = np.floor(blocks * largest / safe + 0.5).clip(-largest, largest)
    return (codes / largest * scale).reshape(x.shape)


@with_and_without_weights
@pytest.mark.parametrize("bits", keep(BITS, [4, 1]))
def test_quantize(bits, weights):
    """Compares the means and both errors, round by round."""
    rule = lsgd.quantize(lsgd.average(), bits, block=8)
    synced, state = sync_arrays(rule, random_rounds(), weights)
    padding = -N % (K * 8)
    worker_error, server_error = np.zeros((K, N)), np.zeros(N + padding)
    for i, x in enumerate(random_rounds()):
        w = weights_of_round(weights, i)
        v = x + worker_error
        sent = quantize_rows(np.pad(v, ((0, 0), (0, padding))), bits, 8)
        worker_error = np.where(w[:, None] > 0, v - sent[:, :N], worker_error)
        mean = weighted_mean(sent, w) + server_error
        result = quantize_rows(mean, bits, 8)
        server_error = np.where(np.arange(N + padding) < N, mean - result, 0)
        np.testing.assert_allclose(synced[i], np.tile(result[:N], (K, 1)), atol=2e-5)
    errors = state.local["params"]
    np.testing.assert_allclose(errors.worker_error, worker_error, atol=2e-5)
    np.testing.assert_allclose(
        errors.server_error.sum(axis=0), server_error[:N], atol=2e-5
    )


@pytest.mark.parametrize(
    "rule",
    [
        lsgd.quantize(lsgd.average(), 1),
        lsgd.quantize(lsgd.average(), 2, rounding="stochastic"),
        lsgd.quantize(lsgd.average(), 4),
        lsgd.cast(lsgd.average(), jnp.float8_e4m3fn),
        lsgd.top_k(lsgd.average(), 0.1),
        lsgd.scaled_sign(lsgd.average()),
    ],
    ids=["1 bit", "2 bits", "4 bits", "float8", "top 10 %", "scaled sign"],
)
def test_error_feedback_preserves_the_sum(rule):
    """The means sent so far and the errors add up to the means of all rounds."""
    rounds = random_rounds(6)
    synced, state = sync_arrays(rule, rounds)
    errors = state.local["params"]
    unsent = errors.worker_error.mean(axis=0)
    if errors.server_error is not None:
        unsent = unsent + errors.server_error.sum(axis=0)
    np.testing.assert_allclose(
        synced[:, 0].sum(axis=0) + unsent, rounds.mean(1).sum(0), atol=2e-5
    )
    assert np.abs(synced[0] - rounds[0].mean(0)).max() > 1e-4


def worker_errors(weights):
    """Returns the errors of stochastic rounding of equal workers, one row each."""
    rule = lsgd.quantize(lsgd.average(), 4, rounding="stochastic")
    rounds = np.tile(random_rounds(1, workers=1), (len(weights), K, 1))
    _, state = sync_arrays(rule, rounds, weights)
    return np.asarray(state.local["params"].worker_error)


def test_stochastic_rounding_differs_between_workers_and_rounds():
    first = worker_errors([np.ones(K)])
    assert len(np.unique(first, axis=0)) == K
    # A round without active workers leaves the errors zero.
    second = worker_errors([np.zeros(K), np.ones(K)])
    assert (first != second).any(axis=1).all()


def test_stochastic_mean_is_unbiased():
    """Worker 0 rounds x = ½ step, and as owner the halves that result from it.

    The mean over workers is ¼ step. Rounding up with the same samples gives ½ step.
    """
    step, size = 1 / 7, 4096
    x = np.zeros((1, 2, size))
    x[0, 0] = step / 2
    x[0, :, ::256] = 1  # The scale of each block.
    rule = lsgd.quantize(lsgd.average(), 4, rounding="stochastic")
    synced, _ = sync_arrays(rule, x)
    of_worker_0 = np.delete(synced[0, 0, : size // 2], slice(None, None, 256))
    np.testing.assert_allclose(of_worker_0.mean() / step, 0.25, atol=0.03)


@with_and_without_weights
def test_top_k(weights):
    rule = lsgd.top_k(lsgd.average(), 0.2)
    synced, _ = sync_arrays(rule, random_rounds(), weights)
    error = np.zeros((K, N))
    for i, x in enumerate(random_rounds()):
        w, v = weights_of_round(weights, i), x + error
        sent = np.zeros_like(v)
        for k in range(K):
            largest = np.argsort(-np.abs(v[k]))[: int(np.ceil(0.2 * N))]
            sent[k, largest] = v[k, largest]
        error = np.where(w[:, None] > 0, v - sent, error)
        np.testing.assert_allclose(synced[i][1], weighted_mean(sent, w), atol=1e-6)


@pytest.mark.full
def test_top_k_of_parts_one_after_the_other(monkeypatch):
    """Equal numbers are selected in the order of their indices, as by one sort."""
    monkeypatch.setattr(compression, "_MIN_SORTED", 8)
    rng = np.random.default_rng(0)
    for size, count in ((1000, 3), (1000, 40), (77, 2), (64, 64)):
        x = rng.integers(-20, 20, size).astype(np.float32)
        expected = np.argsort(-np.abs(x), stable=True)[:count]
        np.testing.assert_array_equal(compression._largest(x, count), expected)


SPLIT_RULES = {
    "cast": lambda: lsgd.cast(lsgd.average(), jnp.bfloat16),
    "scaled_sign": lambda: lsgd.scaled_sign(lsgd.average()),
    "top_k": lambda: lsgd.top_k(lsgd.average(), 0.1),
    "median": lambda: lsgd.median(),
}


@pytest.mark.full
@pytest.mark.parametrize("name", keep(SPLIT_RULES, ["cast", "top_k"]))
def test_large_trees_are_split_at_leaves(name, monkeypatch):
    """Rules without blocks give the same means for one vector and for several."""
    rng = np.random.default_rng(0)
    tree = {"a": (4, 3), "b": (20,), "c": (2, 2), "d": (1,), "e": (30,)}
    rounds = [
        {key: rng.normal(size=(K, *shape)).astype("f4") for key, shape in tree.items()}
        for _ in range(2)
    ]

    def synced():
        made = set_params_algorithm(SPLIT_RULES[name]())
        cluster = lsgd.simulate(made, K)
        state = cluster.init({"params": {k: jnp.zeros(x) for k, x in tree.items()}})
        for values in rounds:
            state = cluster.sync(cluster.step(state, values)[0])
        return state.workers["params"]

    expected = synced()
    monkeypatch.setattr(pieces, "MIN_VECTOR_LIMIT", 16)
    assert_close(synced(), expected, 1e-6)


def test_parts_of_a_tree_end_with_leaves(monkeypatch):
    leaves = [np.zeros(n) for n in (4, 5, 20, 1, 1, 1)]
    assert pieces._split_leaves(leaves, 8) == [slice(0, 6)]
    monkeypatch.setattr(pieces, "MIN_VECTOR_LIMIT", 8)
    parts = [(0, 1), (1, 2), (2, 3), (3, 6)]
    assert pieces._split_leaves(leaves, 8) == [slice(*part) for part in parts]
    assert pieces._split_leaves(leaves, 1) == [slice(0, 6)]


@with_and_without_weights
def test_scaled_sign(weights):
    synced, _ = sync_arrays(lsgd.scaled_sign(lsgd.average()), random_rounds(), weights)
    error = np.zeros((K, N))
    for i, x in enumerate(random_rounds()):
        w, v = weights_of_round(weights, i), x + error
        sent = np.where(v >= 0, 1, -1) * np.abs(v).mean(1, keepdims=True)
        error = np.where(w[:, None] > 0, v - sent, error)
        np.testing.assert_allclose(synced[i][1], weighted_mean(sent, w), atol=1e-6)


def test_scaled_sign_has_one_scale_per_leaf():
    tree = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    cluster = lsgd.simulate(set_params_algorithm(lsgd.scaled_sign(lsgd.average())), 1)
    state = cluster.init({"params": tree})
    a, b = np.array([[1.0, -2, 3]]), np.array([[[10.0, 20], [-30, 40]]])
    state, _ = cluster.step(state, {"a": a.astype("f4"), "b": b.astype("f4")})
    after = cluster.sync(state).workers["params"]
    np.testing.assert_allclose(after["a"], [[2, -2, 2]])
    np.testing.assert_allclose(after["b"], [[[25, 25], [-25, 25]]])


def bytes_by_collective(rule, workers):
    """Returns (name, bytes sent per worker) of each collective of a synchronisation."""
    made = set_params_algorithm(lsgd.outer(optax.sgd(1.0), rule))
    cluster = lsgd.on_mesh(made, mesh(worker=workers))
    state = cluster.init({"params": jax.ShapeDtypeStruct((SIZE,), jnp.float32)})
    return [(op.name, op.bytes_sent) for op in lsgd.collective_ops(cluster.sync, state)]


@pytest.mark.parametrize("workers", keep([2, 4, 8], [8]))
@pytest.mark.parametrize("bits", keep(BITS, [4, 1]))
def test_quantize_sends_packed_integers(bits, workers):
    ops = bytes_by_collective(lsgd.quantize(lsgd.average(), bits), workers)
    # Codes and scales are sent apart.
    assert sorted(name for name, _ in ops) == ["all-gather"] * 2 + ["all-to-all"] * 2
    expected = (workers - 1) / workers * (SIZE * bits / 8 + SIZE / 256 * 4)
    for kind in ("all-gather", "all-to-all"):
        sent = sum(sent for name, sent in ops if name == kind)
        assert expected <= sent <= 1.05 * expected


@pytest.mark.parametrize("workers", [in_full(2), 8])
def test_cast_top_k_and_scaled_sign_send_few_bytes(workers):
    peers = workers - 1
    for dtype, size in ((jnp.bfloat16, 2), (jnp.float8_e4m3fn, 1)):
        ops = bytes_by_collective(lsgd.cast(lsgd.average(), dtype), workers)
        assert [sent for _, sent in ops] == [peers / workers * size * SIZE] * 2
    ops = bytes_by_collective(lsgd.top_k(lsgd.average(), 0.01), workers)
    expected = peers * int(np.ceil(0.01 * SIZE)) * 8
    assert expected <= sum(sent for _, sent in ops) <= 1.05 * expected
    ops = bytes_by_collective(lsgd.scaled_sign(lsgd.average()), workers)
    expected = peers * (SIZE / 8 + 4)
    assert expected <= sum(sent for _, sent in ops) <= 1.05 * expected


@pytest.mark.parametrize("rule", [lsgd.median(), lsgd.trimmed_mean(0.25)])
def test_robust_rules_send_as_many_bytes_as_the_mean(rule):
    half = 7 / 8 * 4 * SIZE
    assert sorted(bytes_by_collective(rule, 8)) == [
        ("all-gather", half),
        ("all-to-all", half),
    ]
    assert bytes_by_collective(lsgd.average(), 8) == [("all-reduce", 2 * half)]


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: lsgd.quantize(lsgd.average(), 3),
            r"quantize\(bits\): bits must be one of \(8, 4, 2, 1\), got 3",
        ),
        (
            lambda: lsgd.quantize(lsgd.diloco(), 4),
            r"quantize\(rule\): it must be a plain mean such as average\(\), got dil",
        ),
        (
            lambda: lsgd.quantize(lsgd.average(), 4, rounding="up"),
            r'quantize\(rounding\): rounding must be "nearest" or "stochastic", '
            r"got 'up'",
        ),
        (
            lambda: lsgd.quantize(lsgd.average(), 4, block=12),
            r"quantize\(block\): block must be a multiple of 8, got 12",
        ),
        (
            lambda: lsgd.cast(lsgd.average(), jnp.float32),
            r"cast\(dtype\): .* got float32",
        ),
        (
            lambda: lsgd.top_k(lsgd.average(), 0.0),
            r"top_k\(fraction\): fraction must be in \(0, 1\], got 0.0",
        ),
        (
            lambda: lsgd.top_k(lsgd.average(), 1.5),
            r"top_k\(fraction\): fraction must be in \(0, 1\], got 1.5",
        ),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
