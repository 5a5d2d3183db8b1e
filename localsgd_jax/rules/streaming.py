"""Streaming: every synchronisation is about another part of the tree."""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax

from localsgd_jax import checks
from localsgd_jax.base import Context, PyTree, RuleState, SyncRule
from localsgd_jax.rules.combine import check_rule

_NUMBER = re.compile(r"\d+")


class Piece(NamedTuple):
    """A part of a leaf.

    Attributes:
      leaf: its number in the tree.
      axis: along which it is cut, or None for the whole leaf.
      start: first index.
      stop: index behind the last.
    """

    leaf: int
    axis: int | None = None
    start: int = 0
    stop: int = 0


def fragment(
    rule: SyncRule,
    n: int,
    *,
    by: str | Callable = "bytes",
    cut: int | None = None,
    turn: int = 1,
) -> SyncRule:
    """Synchronises one of n parts of the tree at a time, in turn.

    In round r = 1, 2, … the fragment is, with t rounds a turn,

        p = ⌊(r − 1)/t⌋ mod n,   [x]ₚ ← rule([x]ₚ)

    Each fragment has a state of the rule to itself, and counts its own rounds. The
    schedule `spread(h, n)` lets every fragment have its turn once in h steps, also
    where n does not divide h. With `delay(rule)` a fragment needs turns of two rounds.

    Args:
      rule: what agrees on a fragment.
      n: fragments.
      by: how leaves are grouped. "bytes": contiguous leaves if they are cut, else such
        that fragments weigh alike; "layer": layer i, the first number in a leaf's path,
        goes to fragment i mod n, leaves without one where there is least; or a
        function of a leaf's path, such as "layers.3.w", that gives its fragment.
      cut: axis along which "bytes" may cut a leaf; None for whole leaves.
      turn: rounds that a fragment has before the next one.

    Returns:
      A rule that in a round moves what `rule` moves for one fragment.

    Raises:
      TypeError: if an argument is not what it must be.
      ValueError: if a number is too small; at `init`, if a fragment would be empty.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.fragment(lsgd.diloco(), 4)
      >>> schedule = lsgd.spread(30, 4)

    References:
      Douillard et al., Streaming DiLoCo with overlapping communication, 2025, section
      2.2. arXiv:2501.18512
    """
    check_rule("fragment(rule)", rule)
    n = checks.integer("fragment(n)", "the number of fragments", n, 1)
    turn = checks.integer("fragment(turn)", "the rounds of a turn", turn, 1)
    if by not in ("bytes", "layer") and not callable(by):
        raise ValueError(
            f'fragment(by): it must be "bytes", "layer" or a function, got {by!r}'
        )

    def init(tree: PyTree) -> RuleState:
        states = [rule.init(part) for part in _parts(tree, n, by, cut)]
        return RuleState(*map(tuple, zip(*states, strict=True)))

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        turns, within = divmod(context.round - 1, turn)
        own_round = turns // n * turn + within + 1

        def one(p: int) -> Callable:
            return lambda tree, state: _apply(
                rule, p, groups, tree, state, context._replace(round=own_round)
            )

        groups = group(tree, n, by, cut)
        if not isinstance(turns, jax.Array):
            return one(turns % n)(tree, state)
        return jax.lax.switch(turns % n, [one(p) for p in range(n)], tree, state)

    return SyncRule(init, apply)


def group(
    tree: PyTree, n: int, by: str | Callable = "bytes", cut: int | None = None
) -> list[list[Piece]]:
    """Returns the pieces of each fragment; the arguments are those of `fragment`.

    Args:
      tree: leaves with shapes and dtypes.
      n: fragments.
      by: how leaves are grouped.
      cut: axis along which "bytes" may cut a leaf.

    Returns:
      n lists of pieces, which together are the whole tree.

    Raises:
      ValueError: if a fragment is empty, or a label is not one of 0, …, n − 1.

    Example:
      >>> import jax.numpy as jnp
      >>> tree = [jnp.zeros(5), jnp.zeros(3), jnp.zeros(2)]
      >>> [[piece.leaf for piece in part] for part in group(tree, 2)]
      [[0], [1, 2]]
    """
    if callable(by):
        groups = _by_label(tree, n, by)
    elif by == "layer":
        groups = _by_layer(tree, n)
    elif cut is None:
        groups = _by_weight(tree, n)
    else:
        groups = _by_cutting(tree, n, cut)
    empty = [p for p, pieces in enumerate(groups) if not pieces]
    if empty:
        raise ValueError(
            f"fragment(n): there must be something for each of the {n} fragments, but "
            f"the {len(jax.tree.leaves(tree))} leaves leave {empty} empty"
        )
    return groups


def _apply(
    rule: SyncRule,
    p: int,
    groups: list[list[Piece]],
    tree: PyTree,
    state: RuleState,
    context: Context,
) -> tuple[PyTree, RuleState]:
    """Applies a rule to one fragment."""
    leaves, structure = jax.tree.flatten(tree)
    part, after = rule.apply(
        [_take(leaves[piece.leaf], piece) for piece in groups[p]],
        RuleState(state.agreed[p], state.own[p]),
        context,
    )
    for piece, values in zip(groups[p], part, strict=True):
        leaves[piece.leaf] = _put(leaves[piece.leaf], piece, values)
    return structure.unflatten(leaves), RuleState(
        _with(state.agreed, p, after.agreed), _with(state.own, p, after.own)
    )


def _parts(
    tree: PyTree, n: int, by: str | Callable, cut: int | None
) -> list[list[jax.Array]]:
    """Returns the values of each fragment."""
    leaves = jax.tree.leaves(tree)
    groups = group(tree, n, by, cut)
    return [[_take(leaves[piece.leaf], piece) for piece in part] for part in groups]


def _take(leaf: jax.Array, piece: Piece) -> jax.Array:
    """Returns a piece of a leaf."""
    if piece.axis is None:
        return leaf
    return jax.lax.slice_in_dim(leaf, piece.start, piece.stop, axis=piece.axis)


def _put(leaf: jax.Array, piece: Piece, values: jax.Array) -> jax.Array:
    """Puts a piece back."""
    if piece.axis is None:
        return values
    return jax.lax.dynamic_update_slice_in_dim(leaf, values, piece.start, piece.axis)


def _with(parts: tuple, p: int, part: PyTree) -> tuple:
    """Replaces one of several."""
    return (*parts[:p], part, *parts[p + 1 :])


def _by_weight(tree: PyTree, n: int) -> list[list[Piece]]:
    """Puts the heaviest leaf that is left where there is least."""
    sizes = [_bytes(leaf) for leaf in jax.tree.leaves(tree)]
    groups, weights = [[] for _ in range(n)], [0] * n
    for leaf in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        p = weights.index(min(weights))
        groups[p].append(Piece(leaf))
        weights[p] += sizes[leaf]
    return [sorted(pieces) for pieces in groups]


def _by_cutting(tree: PyTree, n: int, axis: int) -> list[list[Piece]]:
    """Fills one fragment after another, cutting leaves along an axis where it ends."""
    leaves = jax.tree.leaves(tree)
    share = sum(map(_bytes, leaves)) / n
    groups, done = [[] for _ in range(n)], 0
    for i, leaf in enumerate(leaves):
        can = leaf.ndim > axis and leaf.shape[axis] > 1
        count = leaf.shape[axis] if can else 1
        each = _bytes(leaf) / count
        # Row j belongs where its middle lies.
        places = [
            min(int((done + (j + 0.5) * each) / share), n - 1) for j in range(count)
        ]
        for p in sorted(set(places)):
            start, stop = places.index(p), count - places[::-1].index(p)
            whole = not can or stop - start == count
            groups[p].append(Piece(i) if whole else Piece(i, axis, start, stop))
        done += _bytes(leaf)
    return groups


def _by_layer(tree: PyTree, n: int) -> list[list[Piece]]:
    """Deals layers in turn, and what belongs to none where there is least."""
    groups, weights, rest = [[] for _ in range(n)], [0] * n, []
    for i, (path, leaf) in enumerate(jax.tree.leaves_with_path(tree)):
        if number := _NUMBER.search(_name(path)):
            p = int(number[0]) % n
            groups[p].append(Piece(i))
            weights[p] += _bytes(leaf)
        else:
            rest.append((i, _bytes(leaf)))
    for i, size in sorted(rest, key=lambda pair: -pair[1]):
        p = weights.index(min(weights))
        groups[p].append(Piece(i))
        weights[p] += size
    return [sorted(pieces) for pieces in groups]


def _by_label(tree: PyTree, n: int, label: Callable) -> list[list[Piece]]:
    """Asks the user."""
    groups = [[] for _ in range(n)]
    for i, (path, _) in enumerate(jax.tree.leaves_with_path(tree)):
        p = label(_name(path))
        if p not in range(n):
            raise ValueError(
                f"fragment(by): it must give one of the {n} fragments 0 to {n - 1}, "
                f"got {p!r} for {_name(path)!r}"
            )
        groups[p].append(Piece(i))
    return groups


def _name(path: tuple) -> str:
    """Writes the path of a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _bytes(leaf: jax.Array) -> int:
    """Returns the size of a leaf."""
    return leaf.size * leaf.dtype.itemsize
