"""Agreement with neighbours only: ring and exponential graphs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax import collectives
from localsgd_jax.base import Context, PyTree, RuleState, SyncRule
from localsgd_jax.rules.mean import check_has_mean
from localsgd_jax.trees import choose, narrow, widen

GRAPHS = ("ring", "exponential", "one-peer")


def gossip(graph: str = "ring") -> SyncRule:
    """Averages with neighbours on a graph of workers.

        xₖ ← Σⱼ Wₖⱼ xⱼ

    "ring": a third each of oneself and both neighbours. "exponential": equal parts of
    oneself and those 1, 2, 4, … places before. "one-peer": in round r half of oneself
    and half of the one 2^((r − 1) mod ⌈log₂ K⌉) places before; if K is a power of two,
    ⌈log₂ K⌉ rounds give the mean. W is doubly stochastic (`mixing`), so the mean of all
    workers stays where it is.

    Only permutations travel: 2, ⌈log₂ K⌉ or 1 times the tree. A worker of weight 0 is
    left out: who would read it reads its own, and it reads itself only, so that it does
    not rejoin before it is present again. Other weights count alike.

    Args:
      graph: "ring", "exponential" or "one-peer".

    Returns:
      A rule without state, after which workers need not agree.

    Raises:
      TypeError: at `init`, for a leaf that has no mean.
      ValueError: if the graph is none of those.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.gossip("one-peer")

    References:
      Lian et al., Can Decentralized Algorithms Outperform Centralized Algorithms?,
      2017, Algorithm 1. arXiv:1705.09056
      Ying et al., Exponential Graph is Provably Efficient for Decentralized Deep
      Training, 2021, equations 5 and 7. arXiv:2110.13363
    """
    if graph not in GRAPHS:
        raise ValueError(f"gossip(graph): it must be one of {GRAPHS}, got {graph!r}")

    def init(tree: PyTree) -> RuleState:
        check_has_mean("gossip()", tree)
        return RuleState()

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        count = collectives.size(context)
        turns = neighbours(graph, count)

        def one(shifts: tuple[int, ...]) -> Callable:
            return lambda tree: _mean_with(shifts, tree, context)

        turn = (context.round - 1) % len(turns)
        if len(turns) == 1 or not isinstance(turn, jax.Array):
            return one(turns[turn if len(turns) > 1 else 0])(tree), state
        return jax.lax.switch(turn, list(map(one, turns)), tree), state

    return SyncRule(init, apply)


def neighbours(graph: str, workers: int) -> list[tuple[int, ...]]:
    """Returns how many places before a worker its neighbours are, for each round.

    Args:
      graph: as in `gossip`.
      workers: K.

    Returns:
      For each round of a cycle the shifts, all different and none 0 modulo K.

    Example:
      >>> neighbours("ring", 8), neighbours("exponential", 8), neighbours("one-peer", 8)
      ([(1, 7)], [(1, 2, 4)], [(1,), (2,), (4,)])
    """
    if workers == 1:
        return [()]
    powers = tuple(2**i for i in range((workers - 1).bit_length()))
    if graph == "ring":
        return [(1, workers - 1) if workers > 2 else (1,)]
    return [powers] if graph == "exponential" else [(power,) for power in powers]


def mixing(graph: str, workers: int, turn: int = 1) -> np.ndarray:
    """Returns the mixing matrix W of a round.

    Args:
      graph: as in `gossip`.
      workers: K.
      turn: r, from 1.

    Returns:
      `(K, K)`, doubly stochastic.

    Example:
      >>> mixing("one-peer", 2)
      array([[0.5, 0.5],
             [0.5, 0.5]])

    References:
      Ying et al., 2021, equation 5. arXiv:2110.13363
    """
    turns = neighbours(graph, workers)
    shifts = (0, *turns[(turn - 1) % len(turns)])
    places = np.arange(workers)
    matrix = np.zeros((workers, workers))
    for shift in shifts:
        matrix[places, (places - shift) % workers] += 1 / len(shifts)
    return matrix


def _mean_with(shifts: tuple[int, ...], tree: PyTree, context: Context) -> PyTree:
    """Averages with the workers so many places before."""
    wide = widen(tree)
    if context.weight is None:
        others = [collectives.shift(wide, by, context) for by in shifts]
    else:
        here = context.weight > 0
        safe = choose(here, wide, jax.tree.map(jnp.zeros_like, wide))
        others = []
        for by in shifts:
            theirs, there = collectives.shift((safe, here), by, context)
            others.append(choose(here & there, theirs, wide))
    share = 1 / (len(shifts) + 1)
    mean = jax.tree.map(
        lambda x, *ys: x + share * sum(y - x for y in ys), wide, *others
    )
    return narrow(mean, tree)
