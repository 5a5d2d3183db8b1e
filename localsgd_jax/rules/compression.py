"""Compressed means with error feedback: quantisation, casting, top-k and signs."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.core import collectives
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pieces import Piece
from localsgd_jax.core.pytrees import join_rows, split_rows
from localsgd_jax.core.types import PyTree, SyncRule
from localsgd_jax.core.validation import (
    check,
    check_choice,
    check_dtype,
    check_int,
    check_number,
)
from localsgd_jax.rules.codecs import (
    BITS,
    Codec,
    float_codec,
    integer_codec,
    pack,
    row_multiple,
    split_tiles,
    unpack,
)
from localsgd_jax.rules.error_feedback import (
    MeanAxes,
    check_mean,
    compressed_mean,
    safe_total,
    weighted_or_zero,
)
from localsgd_jax.rules.float4_codec import float4_codec
from localsgd_jax.rules.leaf_rows import read_row, write_row

_MAX_SORTED_PARTS = 16
_MIN_SORTED = 2**20


def quantize(
    rule: SyncRule,
    bits: int,
    *,
    rounding: str = "nearest",
    block: int = 256,
    seed: int = 0,
    encoding: str = "integer",
) -> SyncRule:
    """Sends a mean as packed b-bit integers or floats, with error feedback.

    The tree is flattened and split into one chunk per worker; a tree of more than 2²⁴
    numbers in up to 16 parts of whole leaves, one after the other, to save memory. Q
    quantises to b-bit integers with a float32 scale per block. For worker k and chunk
    j:

        vₖ = xₖ + eₖ                      and eₖ ← vₖ − Q(vₖ)
        mⱼ = Σₖ wₖ [Q(vₖ)]ⱼ / Σₖ wₖ + fⱼ   and fⱼ ← mⱼ − Q(mⱼ)     at worker j
        xₖ ← (Q(m₁), …, Q(m_K))

    The quantised values are exchanged by an all-to-all and an all-gather, together

        2 (K − 1)/K · N (b + 32/block)/8 bytes

    The compression errors eₖ and fⱼ are local state and are sent in later rounds, so no
    part of a mean is lost. Quantise differences, not parameters:
    `outer(optimizer, quantize(average(), 4))`. A worker of weight 0 keeps its eₖ.
    If a worker is sharded over several devices, each device compresses its own piece.

    Args:
      rule: a plain mean, `average()` or `average(axis)`.
      bits: b, 8, 4, 2 or 1. With 1: the signs, scaled by the mean of |v| per block.
      rounding: "nearest", or "stochastic", which is unbiased.
      block: numbers that share a scale, a multiple of 8.
      seed: seed of stochastic rounding; samples differ between rounds and workers.
      encoding: "integer", with equal distances between values, or "e3m0" with 4 bits:
        a sign and an exponent, ± 2^(L − 7) of the largest |v| of the block for L = 1,
        …, 7, and 0.

    Returns:
      A rule with two vectors of local state per worker.

    Raises:
      TypeError: if `rule` is not a rule, or a number not an int; at `init`, for a leaf
        that is not floating point.
      ValueError: if `bits`, `rounding` or `encoding` is not one of the values above,
        `block` is not a multiple of 8, `seed` is negative, or `rule` is not a plain
        mean.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.outer(optax.sgd(0.7), lsgd.quantize(lsgd.average(), bits=4))

    References:
      Karimireddy, Rebjock, Stich, Jaggi, Error Feedback Fixes SignSGD and other
      Gradient Compression Schemes, 2019, Algorithm 2. arXiv:1901.09847
      Tang et al., 1-bit Adam, 2021, section 4: worker and server error feedback.
      arXiv:2102.02888
      Douillard et al., Streaming DiLoCo with overlapping communication, 2025, section
      2.4: E3M0. arXiv:2501.18512
    """
    bits = check_int("quantize(bits)", "bits", bits, 1)
    check(bits in BITS, "quantize(bits)", f"bits must be one of {BITS}", bits)
    choices = ("nearest", "stochastic")
    check_choice("quantize(rounding)", "rounding", rounding, choices)
    block = check_int("quantize(block)", "block", block, 8)
    seed = check_int("quantize(seed)", "seed", seed, 0)
    check(block % 8 == 0, "quantize(block)", "block must be a multiple of 8", block)
    choices = ("integer", "e3m0") if bits == 4 else ("integer",)
    check_choice("quantize(encoding)", "encoding", encoding, choices)
    is_float, stochastic = encoding == "e3m0", rounding == "stochastic"
    codec = (
        float4_codec(block, stochastic)
        if is_float
        else integer_codec(bits, block, stochastic)
    )
    name = call_name(
        "quantize",
        rule,
        bits=bits,
        rounding=rounding,
        block=block,
        seed=seed,
        encoding=encoding if is_float else None,
    )
    return _encoded_mean("quantize", rule, codec, seed, name)


def cast(rule: SyncRule, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> SyncRule:
    """Sends a mean in a narrower floating point type, with error feedback.

    As `quantize`, with Q(x) the nearest number of the type: half the bytes with
    bfloat16 or float16, a quarter with an 8-bit float. Sums are float32.

    Args:
      rule: a plain mean, `average()` or `average(axis)`.
      dtype: a floating point type of one or two bytes, such as `jnp.float8_e4m3fn`.

    Returns:
      A rule with two vectors of local state per worker.

    Raises:
      TypeError: if `rule` is not a rule or `dtype` not a type; at `init`, for a leaf
        that is not floating point.
      ValueError: if the type is not a floating point type of one or two bytes, or
        `rule` is not a plain mean.

    Example:
      >>> import jax.numpy as jnp
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.cast(lsgd.average(), jnp.bfloat16)

    References:
      Jaghouar, Ong, Hagemann, OpenDiLoCo, 2024, section 3.3: float16 pseudo-gradients.
      arXiv:2407.07852
    """
    short = check_dtype("cast(dtype)", "dtype", dtype)
    valid = jnp.issubdtype(short, jnp.floating) and short.itemsize <= 2
    text = "dtype must be a floating point type of one or two bytes"
    check(valid, "cast(dtype)", text, short.name)
    name = call_name("cast", rule, dtype=short.name)
    return _encoded_mean("cast", rule, float_codec(short), 0, name)


def top_k(rule: SyncRule, fraction: float) -> SyncRule:
    """Sends only the largest numbers of each worker, with error feedback.

    With n = ⌈fraction · N⌉ and top keeping the n largest in absolute value:

        vₖ = xₖ + eₖ,   eₖ ← vₖ − top(vₖ)
        xₖ ← Σⱼ wⱼ top(vⱼ) / Σⱼ wⱼ

    It sends an all-gather of n values and n indices, 8 n (K − 1) bytes. This grows with
    K and is less than a plain mean sends only while fraction < 1/K. If a worker is
    sharded over several devices, each device sends the largest numbers of its own
    piece, N and n are those of the piece, and other numbers may be sent than for the
    complete tree.

    Args:
      rule: a plain mean, `average()` or `average(axis)`.
      fraction: fraction of the numbers that is sent, in (0, 1].

    Returns:
      A rule with one vector of local state per worker.

    Raises:
      TypeError: if `rule` is not a rule; at `init`, for a leaf that is not floating
        point.
      ValueError: if the fraction is outside (0, 1], or `rule` is not a plain mean.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.outer(optax.sgd(0.7), lsgd.top_k(lsgd.average(), 0.01))

    References:
      Stich, Cordonnier, Jaggi, Sparsified SGD with Memory, 2018, Algorithm 1.
      arXiv:1809.07599
    """
    call, name = "top_k(fraction)", "fraction"
    fraction = float(check_number(call, name, fraction, above=0, at_most=1))
    axes = check_mean("top_k", rule)

    def exchange(piece: Piece, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        context = piece.context
        count = math.ceil(fraction * vector.size)
        positions = _largest(vector, count)
        values, indices = collectives.all_gather(
            (vector[positions], positions), context, axes
        )
        weights = collectives.gathered_weights(context, axes)[:, None]
        weighted = weighted_or_zero(weights, values)
        total = jnp.zeros_like(vector).at[indices].add(weighted)
        return total / safe_total(weights), vector.at[positions].set(0)

    name = call_name("top_k", rule, fraction=fraction)
    return compressed_mean("top_k", axes, exchange, name=name, num_vectors=1)


def scaled_sign(rule: SyncRule) -> SyncRule:
    """Sends one sign per number and one scale per leaf, with error feedback.

    For each leaf, of n numbers:

        vₖ = xₖ + eₖ,   sₖ = ‖vₖ‖₁/n · sign(vₖ),   eₖ ← vₖ − sₖ
        xₖ ← Σⱼ wⱼ sⱼ / Σⱼ wⱼ

    It sends an all-gather of N/8 bytes and a number per leaf, (K − 1) N/8 bytes in
    total. This grows with K. It is less than `quantize(rule, 1)` sends, which also
    compresses the mean to signs, only up to K = 2. Decoding the signs of eight workers
    takes one CPU core as long as sending the saved bytes at 1 Gbit/s.

    Args:
      rule: a plain mean, `average()` or `average(axis)`.

    Returns:
      A rule with one vector of local state per worker.

    Raises:
      TypeError: if `rule` is not a rule; at `init`, for a leaf that is not floating
        point.
      ValueError: if it is not a plain mean.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.outer(optax.sgd(0.7), lsgd.scaled_sign(lsgd.average()))

    References:
      Karimireddy, Rebjock, Stich, Jaggi, Error Feedback Fixes SignSGD and other
      Gradient Compression Schemes, 2019, Algorithm 1. arXiv:1901.09847
    """
    axes = check_mean("scaled_sign", rule)

    def exchange(piece: Piece, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        context, counts = piece.context, piece.sizes
        ends = np.cumsum(counts)[:-1]
        sums = jnp.stack([jnp.abs(x).sum() for x in jnp.split(vector, ends)])
        totals = np.maximum(counts, 1) * piece.count
        scales = piece.sum(sums) / totals.astype(vector.dtype)

        def expand_per_leaf(scales: jax.Array) -> jax.Array:
            pairs = zip(scales, counts, strict=True)
            return jnp.concatenate([jnp.broadcast_to(s, n) for s, n in pairs])

        padding = -vector.size % row_multiple(8, vector.size)
        is_positive = jnp.pad(vector >= 0, (0, padding)).astype(jnp.uint8)
        packed, gathered_scales = collectives.all_gather(
            (pack(is_positive, 1), scales), context, axes
        )
        weights = collectives.gathered_weights(context, axes)[:, None]
        weighted = weighted_or_zero(weights, gathered_scales) / safe_total(weights)

        def add_worker(mean: jax.Array, message: tuple) -> tuple[jax.Array, None]:
            signs = unpack(message[0], 1)[: vector.size]
            scale = expand_per_leaf(message[1])
            return mean + jnp.where(signs, scale, -scale), None

        # A scan over workers decodes one vector at a time, not K at once.
        mean, _ = jax.lax.scan(add_worker, jnp.zeros_like(vector), (packed, weighted))
        sent = jnp.where(vector >= 0, 1, -1) * expand_per_leaf(scales)
        return mean, vector - sent

    name = call_name("scaled_sign", rule)
    return compressed_mean("scaled_sign", axes, exchange, name=name)


def _largest(vector: jax.Array, count: int) -> jax.Array:
    """Returns the positions of the numbers that are largest in absolute value.

    A sort takes four times the memory of its operand. The candidates of each part of
    the vector are therefore found one part after the other.
    """
    parts = vector.size // max(4 * count, _MIN_SORTED)
    rows = split_rows(jnp.abs(vector), max(1, min(_MAX_SORTED_PARTS, parts)))
    length = rows.shape[1]
    values, columns = jax.lax.map(
        lambda row: jax.lax.top_k(row, min(count, length)), rows
    )
    positions = columns + length * jnp.arange(len(rows), dtype=columns.dtype)[:, None]
    _, chosen = jax.lax.top_k(values.reshape(-1), count)
    return positions.reshape(-1)[chosen]


def _encoded_mean(
    call: str, rule: SyncRule, codec: Codec, seed: int, name: str
) -> SyncRule:
    """Makes a rule that encodes both the messages and the mean."""
    axes = check_mean(call, rule)
    exchange = _encoded_exchange(codec, seed, axes)
    return compressed_mean(call, axes, exchange, name=name, has_server_error=True)


def _encoded_exchange(codec: Codec, seed: int, axes: MeanAxes) -> Callable:
    """Makes the exchange of `_encoded_mean`: encoded all-to-all and all-gather."""

    def encode(tiles: jax.Array, key: jax.Array) -> tuple[PyTree, jax.Array]:
        """Returns the encoded tiles and the error of the encoding."""
        flat = tiles.reshape(*tiles.shape[:-2], -1)
        error = tiles - codec.round_trip(flat, key).reshape(tiles.shape)
        return codec.encode(flat, key), error

    def decode(payload: PyTree, like: jax.Array) -> jax.Array:
        return codec.decode(payload).reshape(like.shape)

    def exchange(
        piece: Piece, vector: jax.Array, server_error: jax.Array
    ) -> tuple[jax.Array, ...]:
        context = piece.context
        count, index = collectives.size(context, axes), collectives.index(context, axes)
        round_key = jax.random.fold_in(jax.random.key(seed), context.round)
        keys = jax.random.split(jax.random.fold_in(round_key, index))
        if piece.axes:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, piece.index)
        if piece.number:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, piece.number)

        multiple = row_multiple(codec.block_size, vector.size // count)
        rows = split_tiles(vector, count, multiple)
        encoded, worker_error = encode(rows, keys[0])
        received = collectives.all_to_all(encoded, context, axes)
        weights = collectives.gathered_weights(context, axes)

        def add_worker(total: jax.Array, message: tuple) -> tuple[jax.Array, None]:
            weight, payload = message
            return total + weighted_or_zero(weight, decode(payload, total)), None

        # A scan decodes one row at a time. XLA:CPU takes six times as long for a sum.
        total, _ = jax.lax.scan(
            add_worker, jnp.zeros_like(rows[0]), (weights, received)
        )
        chunk = total / safe_total(weights)

        own_error = read_row(server_error, piece.sizes, index, chunk.size)
        own_error = own_error.reshape(chunk.shape)
        chunk = chunk + own_error
        encoded_chunk, error = encode(chunk, keys[1])
        if context.weight is not None:
            error = jnp.where(jnp.sum(weights) > 0, error, own_error)
        errors = write_row(error.reshape(-1), piece.sizes, index)
        chunks = collectives.all_gather(encoded_chunk, context, axes)
        results = decode(chunks, rows), worker_error
        return *(join_rows(x, vector.size) for x in results), errors

    return exchange
