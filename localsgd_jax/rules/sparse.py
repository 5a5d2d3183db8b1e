"""Sparse means with decaying error feedback: SparseLoCo."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from localsgd_jax.core import collectives
from localsgd_jax.core.averaging import average
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pieces import Piece
from localsgd_jax.core.pytrees import join_rows, split_rows
from localsgd_jax.core.types import SyncRule
from localsgd_jax.core.validation import check, check_int, check_number
from localsgd_jax.rules.error_feedback import (
    check_mean,
    compressed_mean,
    safe_total,
    weighted_or_zero,
)
from localsgd_jax.rules.outer_optimizer import LearningRate, check_rate, outer
from localsgd_jax.rules.sparse_messages import SparseMessage, decode, encode


def chunked_top_k(
    rule: SyncRule,
    k: int = 64,
    *,
    chunk: int = 4096,
    bits: int | None = 2,
    decay: float = 1.0,
) -> SyncRule:
    """Sends the largest numbers of each chunk in few bits, with error feedback.

    The tree is concatenated and split into chunks. With top keeping the k numbers of
    each chunk that are largest in absolute value, and Q their quantisation:

        vₖ = xₖ + eₖ,   sₖ = Q(top(vₖ)),   eₖ ← β (vₖ − sₖ)
        xₖ ← Σⱼ wⱼ sⱼ / Σⱼ wⱼ

    A position takes log₂(chunk) bits, 12 by default. Q has four bins over 6 σ, σ the
    root mean square of the k numbers of the chunk: the sign, and whether |v| > 1.5 σ.
    The values are the means of |v| in these bins, two bfloat16 per chunk. A worker
    sends, with N numbers in the tree,

        (K − 1) · N/chunk · (k (log₂(chunk) + 2) + 32)/8 bytes

    by an all-gather: with the defaults, 1/141 of the tree per other worker. If a worker
    is sharded over several devices, each device splits its own piece into chunks.

    Args:
      rule: a plain mean, `average()` or `average(axis)`.
      k: numbers sent from each chunk.
      chunk: length of a chunk, at most 65536.
      bits: 2 for Q as above; None to send float32 values.
      decay: β, decay of the error in each round, in [0, 1].

    Returns:
      A rule with one vector of local state per worker.

    Raises:
      TypeError: if `rule` is not a rule, or a number not an int.
      ValueError: if a number is out of range, or `rule` is not a plain mean.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.outer(optax.sgd(1.0), lsgd.chunked_top_k(lsgd.average(), 64))

    References:
      Sarfi et al., Communication Efficient LLM Pre-training with SparseLoCo, 2025,
      Algorithm 1. arXiv:2508.15706. There chunks are 64 × 64 tiles of a matrix; the
      bins of the public configuration are read from a secondary source, and here they
      are symmetric about zero, with levels for each chunk.
    """
    call = "chunked_top_k"
    chunk = check_int(f"{call}(chunk)", "chunk", chunk, 1)
    check(chunk <= 65536, f"{call}(chunk)", "chunk must be at most 65536", chunk)
    k = check_int(f"{call}(k)", "k", k, 1)
    check(k <= chunk, f"{call}(k)", f"k must be at most the chunk, {chunk}", k)
    if bits is not None:
        bits = check_int(f"{call}(bits)", "bits", bits, 2, 2)
    check_number(f"{call}(decay)", "decay", decay, at_least=0, at_most=1)
    axes = check_mean(call, rule)
    quantized = bits is not None

    def exchange(piece: Piece, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        context = piece.context
        chunks = split_rows(vector, -(-vector.size // chunk), chunk)
        message = _encode_largest(chunks, k, quantized)
        gathered = collectives.all_gather(message, context, axes)
        weights = collectives.gathered_weights(context, axes)[:, None, None]
        values, positions = decode(gathered, k, chunk, quantized)
        weighted = weighted_or_zero(weights, values) / safe_total(weights)
        mean = _scatter(weighted, positions, chunks)
        values, positions = decode(message, k, chunk, quantized)
        sent = _scatter(values[None], positions[None], chunks)
        return (
            join_rows(mean, vector.size),
            decay * (vector - join_rows(sent, vector.size)),
        )

    name = call_name(call, rule, k=k, chunk=chunk, bits=bits, decay=decay)
    return compressed_mean(call, axes, exchange, name=name)


def sparseloco(learning_rate: LearningRate = 1.0, decay: float = 0.95) -> SyncRule:
    """Applies the mean of sparse, quantised pseudo-gradients (SparseLoCo).

        vₖ = Δₖ + eₖ,   sₖ = Q(top(vₖ)),   eₖ ← β (vₖ − sₖ)
        x̄ ← x̄ − α Σⱼ wⱼ sⱼ / Σⱼ wⱼ

    It sends 64 of each 4096 numbers, with 12-bit positions and 2-bit values. There is
    no outer momentum. The published period is 30 local steps of AdamW.

    Args:
      learning_rate: α, a number or an optax schedule over rounds.
      decay: β, decay of the error in each round.

    Returns:
      `outer(optax.sgd(learning_rate), chunked_top_k(average(), 64, decay=decay))`.

    Raises:
      ValueError: if the decay is outside [0, 1].

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule, schedule = lsgd.sparseloco(), lsgd.every(30)

    References:
      Sarfi et al., Communication Efficient LLM Pre-training with SparseLoCo, 2025,
      Algorithm 1. arXiv:2508.15706
    """
    check_rate("sparseloco", "learning_rate", learning_rate)
    check_number("sparseloco(decay)", "decay", decay, at_least=0, at_most=1)
    reduce = chunked_top_k(average(), 64, decay=decay)
    name = call_name("sparseloco", learning_rate=learning_rate, decay=decay)
    return dataclasses.replace(outer(optax.sgd(learning_rate), reduce), name=name)


def _encode_largest(chunks: jax.Array, k: int, quantized: bool) -> SparseMessage:
    """Encodes the k largest numbers of each chunk, `(M, chunk)`."""
    _, positions = jax.lax.top_k(jnp.abs(chunks), k)
    values = jnp.take_along_axis(chunks, positions, axis=1)
    return encode(values.T, positions.T, chunks.shape[1], quantized)


def _scatter(values: jax.Array, positions: jax.Array, like: jax.Array) -> jax.Array:
    """Adds values `(n, k, M)` at their positions to zeros `(M, chunk)`."""
    rows = jnp.arange(len(like))[None, None]
    return jnp.zeros_like(like).at[rows, positions].add(values)
