"""Sparse means of chunks, SparseLoCo and clipping, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import mesh
from harness.rule_arrays import (
    K,
    N,
    random_rounds,
    set_params_algorithm,
    sync_arrays,
    sync_tree,
    weighted_mean,
    weights_of_round,
    with_and_without_weights,
)
from harness.selection import in_full, keep

import localsgd_jax as lsgd
from localsgd_jax.rules import sparse_messages

SIZE = 2**20  # Parameters of the programs whose bytes are counted.


def quantize_values(values):
    """Returns the k numbers of a chunk in two bits, with bfloat16 levels."""
    magnitude = np.abs(values)
    large = magnitude > 1.5 * np.sqrt(np.mean(values**2))
    result = np.zeros_like(values)
    for group in (large, ~large):
        if group.any():
            level = float(jnp.bfloat16(magnitude[group].mean()))
            result[group] = np.where(values[group] < 0, -level, level)
    return result


def sparse(v, k, chunk, quantized):
    """Returns the largest k numbers of each chunk of a vector, in float64."""
    padded = np.pad(v, (0, -len(v) % chunk)).reshape(-1, chunk)
    sent = np.zeros_like(padded)
    for row, out in zip(padded, sent, strict=True):
        largest = np.argsort(-np.abs(row), kind="stable")[:k]
        out[largest] = quantize_values(row[largest]) if quantized else row[largest]
    return sent.reshape(-1)[: len(v)]


@with_and_without_weights
@pytest.mark.parametrize("decay", [in_full(1.0), 0.95])
@pytest.mark.parametrize("bits", [in_full(None), 2])
def test_chunked_top_k(bits, decay, weights):
    rule = lsgd.chunked_top_k(lsgd.average(), 3, chunk=10, bits=bits, decay=decay)
    synced, state = sync_arrays(rule, random_rounds(), weights)
    error = np.zeros((K, N))
    for i, x in enumerate(random_rounds()):
        w, v = weights_of_round(weights, i), x + error
        sent = np.array([sparse(row, 3, 10, bits is not None) for row in v])
        error = np.where(w[:, None] > 0, decay * (v - sent), error)
        np.testing.assert_allclose(
            synced[i], np.tile(weighted_mean(sent, w), (K, 1)), atol=1e-5
        )
    np.testing.assert_allclose(
        state.local["params"].worker_error, error, atol=1e-5, rtol=1e-5
    )


def test_published_fixture():
    """Chunk 4, top 1, no quantisation, β ½, α 1: means and errors by hand."""
    rule = lsgd.outer(
        optax.sgd(1.0),
        lsgd.chunked_top_k(lsgd.average(), 1, chunk=4, bits=None, decay=0.5),
    )
    cluster = lsgd.simulate(
        lsgd.from_train_step(
            lambda x, delta: ({"params": x["params"] - delta}, {}), rule
        ),
        2,
    )
    deltas = jnp.array([[4.0, 1, 0, 0], [0, 1, 3, 0]])
    state, means, errors = cluster.init({"params": jnp.zeros(4)}), [], []
    for _ in range(3):
        state, _ = cluster.step(state, deltas)
        errors.append(1 + float(state.local["params"].worker_error[0, 1]))
        state = cluster.sync(state)
        means.append(np.asarray(lsgd.consensus(state)))
    np.testing.assert_allclose(means, np.outer([1, 2, 3], [-2, 0, -1.5, 0]))
    np.testing.assert_allclose(errors, [1, 1.5, 1.75])


def test_all_numbers_in_full_precision_are_the_mean():
    rule = lsgd.chunked_top_k(lsgd.average(), 8, chunk=8, bits=None)
    synced, state = sync_arrays(rule, random_rounds())
    np.testing.assert_allclose(synced[:, 0], random_rounds().mean(1), atol=1e-6)
    assert np.abs(state.local["params"].worker_error).max() == 0


@pytest.mark.full
@pytest.mark.parametrize("k, chunk", [in_full(1, 1), in_full(5, 16), (64, 4096)])
@pytest.mark.parametrize("quantized", [True, False])
def test_messages_decode_to_their_positions(k, chunk, quantized):
    rng = np.random.default_rng(k)
    positions = np.array([rng.permutation(chunk)[:k] for _ in range(7)]).T
    values = rng.normal(size=(k, 7)).astype(np.float32)
    message = sparse_messages.encode(
        jnp.asarray(values), jnp.asarray(positions), chunk, quantized
    )
    decoded, found = sparse_messages.decode(message, k, chunk, quantized)
    np.testing.assert_array_equal(found, positions)
    if not quantized:
        np.testing.assert_array_equal(decoded, values)
        return
    expected = np.array([quantize_values(row.astype(np.float64)) for row in values.T])
    np.testing.assert_allclose(decoded.T, expected, rtol=1e-2)


@pytest.mark.parametrize("workers", keep([2, 8], [8]))
def test_sparseloco_sends_14_bits_per_number(workers):
    """Bytes of the compiled program: at most 5 % above (12 + 2) · 64/4096 bits."""
    cluster = lsgd.on_mesh(
        set_params_algorithm(lsgd.sparseloco()), mesh(worker=workers)
    )
    state = cluster.init({"params": jax.ShapeDtypeStruct((SIZE,), jnp.float32)})
    ops = lsgd.collective_ops(cluster.sync, state)
    assert {op.name for op in ops} == {"all-gather"}
    per_peer = sum(op.bytes_sent for op in ops) / (workers - 1)
    exact = SIZE * (12 + 2) / 8 * 64 / 4096
    assert exact < per_peer <= 1.05 * exact
    assert per_peer * 141 <= 4 * SIZE


@with_and_without_weights
def test_clip_to_median_norm(weights):
    rounds = random_rounds() * np.array([0.1, 1, 5, 2])[:, None]
    rule = lsgd.clip_to_median_norm(lsgd.average())
    synced, _ = sync_arrays(rule, rounds, weights)
    for i, x in enumerate(rounds):
        w = weights_of_round(weights, i)
        norms = np.linalg.norm(x, axis=1)
        scale = np.minimum(1, np.median(norms[w > 0]) / norms)
        expected = weighted_mean(x * scale[:, None], w)
        np.testing.assert_allclose(synced[i], np.tile(expected, (K, 1)), atol=1e-6)


def test_clipping_keeps_equal_and_zero_updates():
    x = np.ones((2, K, N))
    x[1] = 0
    synced, _ = sync_arrays(lsgd.clip_to_median_norm(lsgd.average()), x)
    np.testing.assert_allclose(synced, x, rtol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: lsgd.chunked_top_k(lsgd.average(), 0), r"chunked_top_k\(k\)"),
        (lambda: lsgd.chunked_top_k(lsgd.average(), 5, chunk=4), "k must be at most"),
        (lambda: lsgd.chunked_top_k(lsgd.average(), chunk=2**17), "at most 65536"),
        (
            lambda: lsgd.chunked_top_k(lsgd.average(), bits=3),
            "bits must be at most 2, got 3",
        ),
        (lambda: lsgd.chunked_top_k(lsgd.diloco()), "must be a plain mean"),
        (lambda: lsgd.sparseloco(decay=1.5), r"sparseloco\(decay\)"),
    ],
)
def test_invalid_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_integers_raise():
    for rule in (lsgd.sparseloco(), lsgd.clip_to_median_norm(lsgd.average())):
        with pytest.raises(TypeError, match="floating point"):
            sync_tree(rule, {"n": jnp.zeros(3, int)})
    with pytest.raises(TypeError, match="SyncRule"):
        lsgd.clip_to_median_norm(1)
