"""Decentralised averaging with neighbours on a graph (gossip)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from optax.tree_utils import tree_cast_like

from localsgd_jax.core import collectives
from localsgd_jax.core.averaging import check_inexact
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pytrees import promote, where
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check_choice

TOPOLOGIES = ("ring", "exponential", "one-peer")


def gossip(topology: str = "ring") -> SyncRule:
    """Averages every worker with its neighbours on a graph.

        xₖ ← Σⱼ Wₖⱼ xⱼ

    The mixing matrix W is doubly stochastic, so the mean over workers is preserved:

    - "ring": weight 1/3 each for the worker and its two neighbours.
    - "exponential": equal weights for worker k and the workers k − 1, k − 2, k − 4, …
      (modulo K).
    - "one-peer": in round r weight 1/2 each for worker k and worker k − 2^i (modulo K),
      i = (r − 1) mod ⌈log₂ K⌉. If K is a power of two, ⌈log₂ K⌉ rounds give the mean.

    Only collective permutes are sent: 2, ⌈log₂ K⌉ or 1 times the tree. A worker of
    weight 0 is inactive: its neighbours use their own value in its place, and it keeps
    its value, so it returns to the mean only when it is active again. All positive
    weights are equivalent.

    Args:
      topology: "ring", "exponential" or "one-peer".

    Returns:
      A rule without state, after which workers need not be equal.

    Raises:
      TypeError: at `init`, for a leaf that is not floating point or complex.
      ValueError: if the topology is not one of the three.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.gossip("one-peer")

    References:
      Lian et al., Can Decentralized Algorithms Outperform Centralized Algorithms?,
      2017, Algorithm 1. arXiv:1705.09056
      Ying et al., Exponential Graph is Provably Efficient for Decentralized Deep
      Training, 2021, equations 5 and 7. arXiv:2110.13363
    """
    check_choice("gossip(topology)", "topology", topology, TOPOLOGIES)

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        check_inexact("gossip()", tree)
        return RuleState()

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        cycle = neighbour_shifts(topology, collectives.size(context))

        def mix_with(shifts: tuple[int, ...]) -> Callable:
            return lambda tree: _neighbour_mean(shifts, tree, context)

        if len(cycle) == 1:
            return mix_with(cycle[0])(tree), state
        position = (context.round - 1) % len(cycle)
        if not isinstance(position, jax.Array):
            return mix_with(cycle[position])(tree), state
        return jax.lax.switch(position, list(map(mix_with, cycle)), tree), state

    return SyncRule(init, apply, name=call_name("gossip", topology=topology))


def neighbour_shifts(topology: str, workers: int) -> list[tuple[int, ...]]:
    """Returns the index offsets of the neighbours for each round of a cycle.

    In a round with shift s, worker k receives the tree of worker k − s (modulo K).

    Args:
      topology: as in `gossip`.
      workers: K.

    Returns:
      One tuple of shifts per round, all different and not 0 modulo K.

    Example:
      >>> neighbour_shifts("ring", 8), neighbour_shifts("exponential", 8)
      ([(1, 7)], [(1, 2, 4)])
      >>> neighbour_shifts("one-peer", 8)
      [(1,), (2,), (4,)]
    """
    if workers == 1:
        return [()]
    powers = tuple(2**i for i in range((workers - 1).bit_length()))
    if topology == "ring":
        return [(1, workers - 1) if workers > 2 else (1,)]
    return [powers] if topology == "exponential" else [(power,) for power in powers]


def _neighbour_mean(
    shifts: tuple[int, ...], tree: PyTree, context: SyncContext
) -> PyTree:
    """Averages a tree with the trees of the workers at the given shifts."""
    promoted = promote(tree)
    if context.weight is None:
        neighbours = [collectives.shift(promoted, shift, context) for shift in shifts]
    else:
        active = context.weight > 0
        # An inactive worker sends zeros, because its own numbers may not be finite.
        message = where(active, promoted, jax.tree.map(jnp.zeros_like, promoted))
        neighbours = []
        for shift in shifts:
            received, sender_active = collectives.shift(
                (message, active), shift, context
            )
            neighbours.append(where(active & sender_active, received, promoted))
    weight = 1 / (len(shifts) + 1)
    mean = jax.tree.map(
        lambda x, *ys: x + weight * sum(y - x for y in ys), promoted, *neighbours
    )
    return tree_cast_like(mean, tree)
