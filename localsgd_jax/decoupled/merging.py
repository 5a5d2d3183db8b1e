"""Merge policies: the time of a merge, and the weights of contributions."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from localsgd_jax.asynchronous.aggregation import (
    Aggregation,
    mean_update,
    resolve_aggregation,
    resolve_weighting,
    server_optimizer,
)
from localsgd_jax.core.pytrees import where
from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check_int, check_number, check_type


class Counts(NamedTuple):
    """Work in a contribution.

    Attributes:
      steps: local steps.
      examples: examples in these steps.
      tokens: tokens in these steps.
    """

    steps: int
    examples: int
    tokens: int


class MergePolicy(NamedTuple):
    """Time and form of a merge.

    Attributes:
      aggregation: `aggregation(outer) -> Aggregation`, from the outer optimizer of the
        job or None.
      deadline: `deadline(arrivals, expected, joining) -> time` of the merge, infinite
        if more contributions are needed, from the times of the arrivals, ascending, the
        predicted ones of the other learners, and those of learners that have not
        contributed before.
      weight: `weight(counts, staleness) -> float`, weight of a contribution in the
        mean.
      num_workers: `num_workers(members) -> int`, K of the `UpdateContext`.
      name: the call that made the policy.
    """

    aggregation: Callable[[optax.GradientTransformation | None], Aggregation]
    deadline: Callable[[Sequence[float], Sequence[float], Sequence[float]], float]
    weight: Callable[[Counts, int], float]
    num_workers: Callable[[int], int]
    name: str


def by_examples(counts: Counts) -> float:
    """Weighs a contribution by its number of examples.

    Args:
      counts: work in the contribution.

    Returns:
      The number of examples.

    Example:
      >>> by_examples(Counts(steps=4, examples=32, tokens=320))
      32.0
    """
    check_type("by_examples(counts)", "counts", counts, Counts)
    return float(counts.examples)


def by_tokens(counts: Counts) -> float:
    """Weighs a contribution by its number of tokens.

    Args:
      counts: work in the contribution.

    Returns:
      The number of tokens.

    Example:
      >>> by_tokens(Counts(steps=4, examples=32, tokens=320))
      320.0
    """
    check_type("by_tokens(counts)", "counts", counts, Counts)
    return float(counts.tokens)


def by_token_rate(counts: Counts) -> float:
    """Weighs a contribution by tokens² / steps.

    Args:
      counts: work in the contribution.

    Returns:
      The square of the number of tokens divided by the number of local steps.

    Example:
      >>> by_token_rate(Counts(steps=4, examples=32, tokens=320))
      25600.0

    References:
      Decoupled DiLoCo for Resilient Distributed Pre-training, 2026. arXiv:2604.21428
    """
    check_type("by_token_rate(counts)", "counts", counts, Counts)
    return counts.tokens**2 / counts.steps


def immediate(
    aggregation: Aggregation | None = None, *, workers: int | None = None
) -> MergePolicy:
    """Merges each contribution when it arrives.

    With the update pₖ of learner k since it last read the model:

        z ← z + pₖ / K

    or as the aggregation defines, such as with weights by staleness
    (`asynchronous.server_optimizer(optimizer, polynomial_weighting())`) or with
    `asynchronous.delayed_nesterov`. No learner waits for another.

    Args:
      aggregation: how an update changes the model; None for `mean_update()`, or
        for `server_optimizer(outer)` if the job has an outer optimizer.
      workers: K; None for the number of learners that are members at the merge.

    Returns:
      A policy for `Job`.

    Raises:
      TypeError: if the aggregation is not an `Aggregation` or K not an int.
      ValueError: if K is below 1.

    Example:
      >>> from localsgd_jax import asynchronous
      >>> policy = immediate(asynchronous.delayed_nesterov(0.7, buffer=4))

    References:
      Stich, Local SGD Converges Fast and Communicates Little, 2019, Algorithm 2.
      arXiv:1805.09767
    """
    if workers is not None:
        check_int("immediate(workers)", "it", workers, 1)
    if aggregation is not None:
        resolve_aggregation("immediate(aggregation)", aggregation)

    def resolve(outer: optax.GradientTransformation | None) -> Aggregation:
        if aggregation is not None and outer is not None:
            raise ValueError(
                "Job(outer): immediate(aggregation) already defines the outer "
                "optimizer; pass one of them"
            )
        if aggregation is not None:
            return aggregation
        return mean_update() if outer is None else server_optimizer(outer)

    return MergePolicy(
        resolve,
        lambda arrivals, expected, joining: arrivals[0] if arrivals else math.inf,
        lambda counts, staleness: 1.0,
        lambda members: max(members, 1) if workers is None else workers,
        f"immediate(workers={workers})",
    )


def quorum(
    q: int,
    grace: float = 0.0,
    *,
    weight: Callable[[Counts], float] = by_examples,
    weighting: Callable | None = None,
) -> MergePolicy:
    """Merges the contributions of at least q learners.

    With the updates pₖ that have arrived, their weights aₖ and staleness sₖ:

        z ← z + outer(−Σₖ w(sₖ) aₖ pₖ / Σₖ w(sₖ) aₖ)

    A merge needs the contributions of q learners, or of all if there are fewer. Then it
    waits for each other learner whose predicted arrival is at most `grace` away. It
    proceeds with fewer than q if all other learners are late by `grace`.
    The prediction is the mean time between its contributions plus twice their mean
    deviation. A learner that is predicted later, or is late, is not waited for. Its
    update counts in the next merge. A learner that has joined and contributed nothing
    yet is late after twice the time of the slowest other one.

    Args:
      q: number of learners.
      grace: longest wait after the q-th contribution, in seconds.
      weight: weight by the work in a contribution: `by_examples`, `by_tokens`,
        `by_token_rate`, or a function of `Counts`.
      weighting: function from the staleness, in merges, to a further factor; None for
        `asynchronous.constant_weighting()`.

    Returns:
      A policy for `Job`.

    Raises:
      TypeError: if q is not an int or a function is not callable.
      ValueError: if q is below 1 or the grace window negative or infinite.

    Example:
      >>> policy = quorum(3, grace=2.0, weight=by_tokens)

    References:
      Decoupled DiLoCo for Resilient Distributed Pre-training, 2026. arXiv:2604.21428
    """
    q = check_int("quorum(q)", "q", q, 1)
    grace = check_number("quorum(grace)", "grace", grace, at_least=0)
    check_type("quorum(weight)", "weight", weight, Callable)
    staleness_weight = resolve_weighting("quorum(weighting)", weighting)

    def deadline(
        arrivals: Sequence[float], expected: Sequence[float], joining: Sequence[float]
    ) -> float:
        missing = [*expected, *joining]
        needed = min(q, len(arrivals) + len(missing))
        if len(arrivals) >= needed > 0:
            opened = arrivals[needed - 1]
            return max([opened, *(t for t in expected if t <= opened + grace)])
        if not arrivals:
            return math.inf
        # Learners that wait for each other at different fragments are late here.
        return max([*missing, arrivals[-1]]) + grace

    def resolve(outer: optax.GradientTransformation | None) -> Aggregation:
        return server_optimizer(optax.sgd(1.0) if outer is None else outer)

    return MergePolicy(
        resolve,
        deadline,
        lambda counts, staleness: float(weight(counts) * staleness_weight(staleness)),
        lambda members: 1,
        f"quorum({q}, {grace})",
    )


def add_weighted(
    total: PyTree, update: PyTree, weight: jax.Array
) -> tuple[PyTree, jax.Array]:
    """Adds a weighted update unless it has a NaN or infinite entry.

    Args:
      total: weighted sum so far.
      update: pₖ.
      weight: its weight, a float scalar.

    Returns:
      The new sum, and whether the update was finite.
    """
    leaves = jax.tree.leaves(update)
    finite = jnp.all(jnp.stack([jnp.isfinite(x).all() for x in leaves]))
    added = jax.tree.map(lambda t, p: t + weight * p, total, update)
    return where(finite, added, total), finite
