"""Fewer bytes on the wire: means of packed numbers, with error feedback."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax import checks, collectives
from localsgd_jax.base import Context, PyTree, RuleState, SyncRule
from localsgd_jax.rules.codecs import BITS, Codec, floats, integers, pack, unpack
from localsgd_jax.rules.combine import check_rule
from localsgd_jax.rules.mean import check_has_mean
from localsgd_jax.trees import choose, flat, unflat


class Residual(NamedTuple):
    """What has not been sent yet, one worker's own.

    Attributes:
      sender: rest of what this worker had to send, `(N,)`.
      owner: rest of the means that this worker wrote, zero outside its piece, `(N,)`.
    """

    sender: jax.Array
    owner: jax.Array


def quantize(
    rule: SyncRule,
    bits: int,
    *,
    rounding: str = "nearest",
    block: int = 256,
    seed: int = 0,
) -> SyncRule:
    """Sends a mean as packed b-bit integers, with error feedback.

    The tree is one vector, cut into a piece for each worker. With Q writing b-bit
    integers and a float32 scale for each block, for worker k and piece j:

        vₖ = xₖ + eₖ                      and eₖ ← vₖ − Q(vₖ)
        mⱼ = Σₖ wₖ [Q(vₖ)]ⱼ / Σₖ wₖ + fⱼ   and fⱼ ← mⱼ − Q(mⱼ)     at worker j
        xₖ ← (Q(m₁), …, Q(m_K))

    Two exchanges of packed bytes, an all-to-all and an all-gather, with

        2 (K − 1)/K · N (b + 32/block)/8 bytes

    What is left unsent is a worker's own and is sent later: no part of a mean is lost.
    Quantise differences, not parameters: `outer(optimizer, quantize(average(), 4))`.
    A worker of weight 0 keeps its eₖ. Flattening brings together what is sharded
    within a worker.

    Args:
      rule: a plain mean, `average()` or one over some axes.
      bits: b, 8, 4, 2 or 1. With 1: signs, and the mean of |v| over a block.
      rounding: "nearest", or "stochastic", which has the right mean.
      block: numbers that share a scale, a multiple of 8.
      seed: of stochastic rounding; draws differ between rounds and workers.

    Returns:
      A rule that remembers two vectors for each worker.

    Raises:
      TypeError: if an argument is not what it must be.
      ValueError: if `bits` or `rounding` is none of those, `block` no multiple of 8, or
        `rule` no plain mean.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.outer(optax.sgd(0.7), lsgd.quantize(lsgd.average(), bits=4))

    References:
      Karimireddy, Rebjock, Stich, Jaggi, Error Feedback Fixes SignSGD and other
      Gradient Compression Schemes, 2019, Algorithm 2. arXiv:1901.09847
      Tang et al., 1-bit Adam, 2021, section 4: feedback at both ends. arXiv:2102.02888
    """
    if bits not in BITS:
        raise ValueError(f"quantize(bits): it must be one of {BITS}, got {bits!r}")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(
            'quantize(rounding): it must be "nearest" or "stochastic", got '
            f"{rounding!r}"
        )
    checks.integer("quantize(block)", "block", block, 8)
    if block % 8:
        raise ValueError(f"quantize(block): it must be a multiple of 8, got {block}")
    codec = integers(bits, block, rounding == "stochastic")
    return _with_feedback("quantize", rule, codec, seed)


def cast(rule: SyncRule, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> SyncRule:
    """Sends a mean as shorter floats, with error feedback.

    As `quantize`, with Q(x) the nearest number of a floating point type: half the bytes
    with bfloat16 or float16, a quarter with an 8-bit float. Sums are float32.

    Args:
      rule: a plain mean, `average()` or one over some axes.
      dtype: a floating point type of at most two bytes, such as `jnp.float8_e4m3fn`.

    Returns:
      A rule that remembers two vectors for each worker.

    Raises:
      TypeError: if an argument is not what it must be.
      ValueError: if the type is none of those, or `rule` no plain mean.

    Example:
      >>> import jax.numpy as jnp
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.cast(lsgd.average(), jnp.bfloat16)

    References:
      Jaghouar, Ong, Hagemann, OpenDiLoCo, 2024, section 3.3: float16 pseudo-gradients.
      arXiv:2407.07852
    """
    kind = jnp.dtype(dtype)
    if not jnp.issubdtype(kind, jnp.floating) or kind.itemsize > 2:
        raise ValueError(
            "cast(dtype): it must be a floating point type of one or two bytes, got "
            f"{kind.name}"
        )
    return _with_feedback("cast", rule, floats(kind), 0)


def topk(rule: SyncRule, fraction: float) -> SyncRule:
    """Sends only the largest numbers of each worker, with error feedback.

    With n = ⌈fraction · N⌉ and top keeping the n largest in absolute value:

        vₖ = xₖ + eₖ,   eₖ ← vₖ − top(vₖ)
        xₖ ← Σⱼ wⱼ top(vⱼ) / Σⱼ wⱼ

    An all-gather of n values and n indices, 8 n (K − 1) bytes: it grows with K, and
    beats the plain mean only while fraction < 1/K.

    Args:
      rule: a plain mean, `average()` or one over some axes.
      fraction: share of the numbers that travels, in (0, 1].

    Returns:
      A rule that remembers a vector for each worker.

    Raises:
      TypeError: if an argument is not what it must be.
      ValueError: if the fraction is outside (0, 1], or `rule` no plain mean.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.outer(optax.sgd(0.7), lsgd.topk(lsgd.average(), 0.01))

    References:
      Stich, Cordonnier, Jaggi, Sparsified SGD with Memory, 2018, Algorithm 1.
      arXiv:1809.07599
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"topk(fraction): it must be in (0, 1], got {fraction}")
    axis = mean_axis("topk", rule)

    def send(
        vector: jax.Array, tree: PyTree, context: Context
    ) -> tuple[jax.Array, jax.Array]:
        del tree
        count = math.ceil(fraction * vector.size)
        _, places = jax.lax.top_k(jnp.abs(vector), count)
        parts = collectives.gather((vector[places], places), context, axis)
        share = collectives.shares(context, axis)[:, None]
        sums = jnp.zeros_like(vector).at[parts[1]].add(masked(share, parts[0]))
        return sums / whole(share), vector.at[places].set(0)

    return _by_gathering("topk", send, axis)


def signs(rule: SyncRule) -> SyncRule:
    """Sends a sign for each number and one size for each leaf, with error feedback.

    For each leaf, of n numbers:

        vₖ = xₖ + eₖ,   sₖ = ‖vₖ‖₁/n · sign(vₖ),   eₖ ← vₖ − sₖ
        xₖ ← Σⱼ wⱼ sⱼ / Σⱼ wⱼ

    An all-gather of N/8 bytes and a number for each leaf, (K − 1) N/8 bytes in all: it
    grows with K, and beats `quantize(rule, 1)`, which writes the mean as signs once
    more, up to K = 2. Reading the signs of eight workers takes a CPU core as long as
    sending what they save at 1 Gbit/s.

    Args:
      rule: a plain mean, `average()` or one over some axes.

    Returns:
      A rule that remembers a vector for each worker.

    Raises:
      TypeError: if `rule` is not a rule.
      ValueError: if it is no plain mean.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.outer(optax.sgd(0.7), lsgd.signs(lsgd.average()))

    References:
      Karimireddy, Rebjock, Stich, Jaggi, Error Feedback Fixes SignSGD and other
      Gradient Compression Schemes, 2019, Algorithm 1. arXiv:1901.09847
    """
    axis = mean_axis("signs", rule)

    def send(
        vector: jax.Array, tree: PyTree, context: Context
    ) -> tuple[jax.Array, jax.Array]:
        counts = [leaf.size for leaf in jax.tree.leaves(tree)]
        ends = np.cumsum(counts)[:-1]
        sizes = jnp.stack([jnp.abs(x).mean() for x in jnp.split(vector, ends)])

        def along(sizes: jax.Array) -> jax.Array:
            parts = zip(sizes, counts, strict=True)
            return jnp.concatenate([jnp.broadcast_to(s, n) for s, n in parts])

        up = jnp.pad(vector >= 0, (0, -vector.size % 8)).astype(jnp.uint8)
        parts = collectives.gather((pack(up, 1), sizes), context, axis)
        share = collectives.shares(context, axis)[:, None]
        scales = masked(share, parts[1]) / whole(share)

        def add(mean: jax.Array, theirs: tuple) -> tuple[jax.Array, None]:
            signs, scale = unpack(theirs[0], 1)[: vector.size], along(theirs[1])
            return mean + jnp.where(signs, scale, -scale), None

        # One worker after another: all at once would need K vectors.
        mean, _ = jax.lax.scan(add, jnp.zeros_like(vector), (parts[0], scales))
        return mean, vector - jnp.where(vector >= 0, 1, -1) * along(sizes)

    return _by_gathering("signs", send, axis)


def mean_axis(call: str, rule: SyncRule) -> tuple[str, ...] | None:
    """Returns over which axes a rule is the plain mean; refuses another rule."""
    check_rule(f"{call}(rule)", rule)
    if rule.mean_over is None:
        raise ValueError(
            f"{call}(rule): it must be a plain mean such as average(), whose transport "
            f"changes; inside an outer rule: outer(optimizer, {call}(average(), ...))"
        )
    return rule.mean_over or None


def masked(share: jax.Array, values: jax.Array) -> jax.Array:
    """Multiplies by shares; what has none is 0 even where it is not finite."""
    return jnp.where(share > 0, share * values, 0)


def whole(share: jax.Array) -> jax.Array:
    """Returns the sum of shares to divide by, 1 if there are none."""
    return jnp.where((total := jnp.sum(share)) > 0, total, 1)


def _with_feedback(call: str, rule: SyncRule, codec: Codec, seed: int) -> SyncRule:
    """Makes a rule that averages what a codec writes, with feedback at both ends."""
    axis = mean_axis(call, rule)

    def init(tree: PyTree) -> RuleState:
        check_has_mean(f"{call}()", tree)
        rest = jnp.zeros_like(flat(tree))
        return RuleState(own=Residual(rest, rest))

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        anyone, _ = collectives.present(context)
        old = collectives.equal_within(state.own, context, axis)
        here = _here(context, axis)
        vector = choose(here, flat(tree) + old.sender, jnp.zeros_like(old.sender))
        count, place = (f(context, axis) for f in (collectives.size, collectives.index))
        turn = jax.random.fold_in(jax.random.key(seed), context.round)
        keys = jax.random.split(jax.random.fold_in(turn, place))

        rows = cut(vector, count, codec.block)
        written = codec.encode(rows, keys[0])
        received = codec.decode(collectives.transpose(written, context, axis))
        share = collectives.shares(context, axis)[:, None]
        piece = jnp.sum(masked(share, received), axis=0) / whole(share)
        rests = cut(old.owner, count, codec.block)
        piece = piece + rests[place]
        rewritten = codec.encode(piece, keys[1])
        mean = codec.decode(collectives.gather(rewritten, context, axis))

        sender = vector - _join(codec.decode(written), vector)
        owner = jnp.zeros_like(rests).at[place].set(piece - codec.decode(rewritten))
        sender = choose(here, sender, old.sender)
        after = Residual(sender, _join(owner, vector))
        after = choose(anyone, RuleState(own=after), state)
        return choose(anyone, unflat(_join(mean, vector), tree), tree), after

    return SyncRule(init, apply)


def _by_gathering(call: str, send: Callable, axis: tuple[str, ...] | None) -> SyncRule:
    """Makes a rule of `send(vector, tree, context) -> (mean, rest)`, with feedback."""

    def init(tree: PyTree) -> RuleState:
        check_has_mean(f"{call}()", tree)
        return RuleState(own=jnp.zeros_like(flat(tree)))

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        anyone, _ = collectives.present(context)
        old = collectives.equal_within(state.own, context, axis)
        here = _here(context, axis)
        vector = choose(here, flat(tree) + old, jnp.zeros_like(old))
        mean, rest = send(vector, tree, context)
        after = RuleState(own=choose(here, rest, old))
        return choose(anyone, unflat(mean, tree), tree), choose(anyone, after, state)

    return SyncRule(init, apply)


def cut(vector: jax.Array, count: int, block: int = 1) -> jax.Array:
    """Cuts a vector into a row of whole blocks for each worker, filled up with zeros.

    Args:
      vector: `(N,)`.
      count: K.
      block: numbers that stay together.

    Returns:
      `(K, m)`, m a multiple of the block.
    """
    fill = -vector.size % (count * block)
    return jnp.pad(vector, (0, fill)).reshape(count, -1)


def _join(rows: jax.Array, vector: jax.Array) -> jax.Array:
    """Puts rows together to a vector as long as another."""
    return rows.reshape(-1)[: vector.size]


def _here(context: Context, axis: tuple[str, ...] | None) -> jax.Array | bool:
    """Returns whether this worker's group takes part; who is absent sends zeros."""
    weight = collectives.group_weight(context, axis)
    return True if weight is None else weight > 0
