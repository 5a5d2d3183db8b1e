"""Streaming synchronisation: one fragment of the parameters per round."""

import math
import numbers
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pieces import on_pieces, piece_shapes, with_specs
from localsgd_jax.core.pytrees import is_key
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check, check_int, check_rule, describe
from localsgd_jax.rules.packed_results import pack, unpack, vector_sizes

_NUMBER = re.compile(r"\d+")


_MAX_FRAGMENTS = 10_000


class LeafSlice(NamedTuple):
    """Slice of a leaf along one axis.

    Attributes:
      leaf: index of the leaf in the flattened tree.
      axis: axis of the slice, or None for the complete leaf.
      start: first index.
      stop: index after the last.
    """

    leaf: int
    axis: int | None = None
    start: int = 0
    stop: int = 0


def fragment(
    rule: SyncRule,
    n: int,
    *,
    grouping: str | Callable[[str], int] = "bytes",
    split_axis: int | None = None,
    rounds_per_fragment: int = 1,
) -> SyncRule:
    """Synchronises one of n fragments of the tree per round, in cyclic order.

    In round r = 1, 2, …, with t rounds per fragment, the fragment is

        p = ⌊(r − 1)/t⌋ mod n,   [x]ₚ ← rule([x]ₚ)

    Each fragment has its own state of the rule and counts its own rounds. With the
    schedule `evenly_spaced(h, n)` every fragment is synchronised once in h steps, even
    if n does not divide h. `delay(rule)` requires two rounds per fragment.

    Args:
      rule: the rule that synchronises a fragment.
      n: number of fragments.
      grouping: assignment of leaves to fragments. "bytes": fragments of similar size,
        contiguous if leaves may be split. "layer": layer i, the first number in the
        path of a leaf, goes to fragment i mod n; leaves without a number go to the
        smallest fragment. A function maps the path of a leaf, such as "layers.3.w", to
        the index of its fragment.
      split_axis: axis along which "bytes" may split a leaf; None for complete leaves.
        If a worker is sharded over several devices, each device splits its own piece.
      rounds_per_fragment: number of consecutive rounds of a fragment, t.

    Returns:
      A rule that communicates like `rule` for one fragment.

    Raises:
      TypeError: if `rule` is not a rule, or a number not an int.
      ValueError: if a number is below 1 or the grouping unknown; at `init`, if a
        fragment is empty.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.fragment(lsgd.diloco(), 4)
      >>> schedule = lsgd.evenly_spaced(30, 4)

    References:
      Douillard et al., Streaming DiLoCo with overlapping communication, 2025, section
      2.2. arXiv:2501.18512
    """
    check_rule("fragment(rule)", rule)
    n = check_int("fragment(n)", "the number of fragments", n, 1)
    rounds_per_fragment = check_int(
        "fragment(rounds_per_fragment)", "rounds_per_fragment", rounds_per_fragment, 1
    )
    is_name = isinstance(grouping, str) and grouping in ("bytes", "layer")
    text = 'grouping must be "bytes", "layer" or a function'
    is_valid = is_name or callable(grouping)
    check(is_valid, "fragment(grouping)", text, describe(grouping))
    if split_axis is not None:
        name = "split_axis"
        split_axis = check_int(f"fragment({name})", name, split_axis, 0)

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        leaves = jax.tree.leaves(tree)
        groups = _assign(tree, specs, n, grouping, split_axis)

        def init_fragment(group: list[LeafSlice]) -> RuleState:
            slice_specs = _slice_specs(group, specs)
            slices = _slices(leaves, group, SyncContext({}, 0, specs=specs))
            state = rule.init(slices, slice_specs)
            return with_specs(state, slices, slice_specs)

        states = map(init_fragment, groups)
        return RuleState(*map(tuple, zip(*states, strict=True)))

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        groups = _assign(tree, context.specs, n, grouping, split_axis)
        slot, round_in_slot = divmod(context.round - 1, rounds_per_fragment)
        fragment_round = slot // n * rounds_per_fragment + round_in_slot + 1
        fragment_context = context._replace(round=fragment_round)

        def sync_fragment(p: int, tree: PyTree, state: RuleState) -> tuple:
            return _apply(rule, p, groups[p], tree, state, fragment_context)

        if not isinstance(slot, jax.Array):
            results = sync_fragment(slot % n, tree, state)
            return _update(slot % n, groups[slot % n], tree, state, results, context)
        return _switch(slot % n, sync_fragment, groups, tree, state, context)

    name = call_name(
        "fragment",
        rule,
        n=n,
        grouping=grouping,
        split_axis=split_axis,
        rounds_per_fragment=rounds_per_fragment,
    )
    return SyncRule(init, apply, name=name)


def assign_fragments(
    tree: PyTree,
    n: int,
    grouping: str | Callable[[str], int] = "bytes",
    split_axis: int | None = None,
) -> list[list[LeafSlice]]:
    """Assigns the leaves of a tree to n fragments.

    Args:
      tree: leaves with shapes and dtypes.
      n: number of fragments.
      grouping: as in `fragment`.
      split_axis: as in `fragment`.

    Returns:
      n lists of slices, which together cover the tree.

    Raises:
      ValueError: if a fragment is empty, or `grouping` returns an index outside
        0, …, n − 1.

    Example:
      >>> import jax.numpy as jnp
      >>> tree = [jnp.zeros(5), jnp.zeros(3), jnp.zeros(2)]
      >>> [[part.leaf for part in group] for group in assign_fragments(tree, 2)]
      [[0], [1, 2]]
    """
    leaves = jax.tree.leaves(tree)
    count = len(leaves)
    text = f"each of the {n} fragments must get at least one of the {count} leaves"
    # A list of so many empty fragments would only take time and memory.
    limit = max(_MAX_FRAGMENTS, sum(math.prod(jnp.shape(leaf)) for leaf in leaves))
    check(n <= limit, "fragment(n)", text, f"n = {n}")
    if callable(grouping):
        groups = _by_user_function(tree, n, grouping)
    elif grouping == "layer":
        groups = _by_layer(tree, n)
    elif split_axis is None:
        groups = _balanced(tree, n)
    else:
        groups = _contiguous(tree, n, split_axis)
    empty = [p for p, group in enumerate(groups) if not group]
    check(not empty, "fragment(n)", text, f"none for fragments {empty}")
    return groups


def _assign(
    tree: PyTree,
    specs: PyTree | None,
    n: int,
    grouping: str | Callable[[str], int],
    split_axis: int | None,
) -> list[list[LeafSlice]]:
    """Assigns leaves to fragments; slices of leaves count in each device's piece."""
    shapes = tree if split_axis is None else piece_shapes(tree, specs)
    return assign_fragments(shapes, n, grouping, split_axis)


def _apply(
    rule: SyncRule,
    p: int,
    group: list[LeafSlice],
    tree: PyTree,
    state: RuleState,
    context: SyncContext,
) -> tuple[list[jax.Array], RuleState]:
    """Returns the new values and the new state of fragment p."""
    fragment_state = RuleState(state.shared[p], state.local[p])
    slice_context = context._replace(specs=_slice_specs(group, context.specs))
    slices = _slices(jax.tree.leaves(tree), group, context)
    return rule.apply(slices, fragment_state, slice_context)


def _update(
    p: int,
    group: list[LeafSlice],
    tree: PyTree,
    state: RuleState,
    results: tuple[list[jax.Array], RuleState],
    context: SyncContext,
) -> tuple[PyTree, RuleState]:
    """Replaces the values and the state of fragment p."""
    leaves, structure = jax.tree.flatten(tree)
    values, new = results
    slice_context = context._replace(specs=_slice_specs(group, context.specs))
    updated = _update_slices(leaves, group, values, slice_context)
    for leaf_slice, leaf in zip(group, updated, strict=True):
        leaves[leaf_slice.leaf] = leaf
    new_state = RuleState(
        _replace_item(state.shared, p, new.shared),
        _replace_item(state.local, p, new.local),
    )
    return structure.unflatten(leaves), new_state


def _switch(
    p: jax.Array,
    sync_fragment: Callable,
    groups: list[list[LeafSlice]],
    tree: PyTree,
    state: RuleState,
    context: SyncContext,
) -> tuple[PyTree, RuleState]:
    """Synchronises fragment p, a traced number."""
    indices = range(len(groups))
    if context.specs is not None or any(map(is_key, jax.tree.leaves((tree, state)))):

        def branch(q: int, tree: PyTree, state: RuleState) -> tuple:
            results = sync_fragment(q, tree, state)
            return _update(q, groups[q], tree, state, results, context)

        branches = [partial(branch, q) for q in indices]
        return jax.lax.switch(p, branches, tree, state)

    leaves = jax.tree.leaves(tree)
    parts = [
        (_slices(leaves, groups[q], context), state.shared[q], state.local[q])
        for q in indices
    ]
    sizes = [vector_sizes(part) for part in zip(*parts, strict=True)]

    def packed_branch(q: int, tree: PyTree, state: RuleState) -> list[dict]:
        values, new = sync_fragment(q, tree, state)
        return list(map(pack, (values, *new), sizes))

    branches = [partial(packed_branch, q) for q in indices]
    packed = jax.lax.switch(p, branches, tree, state)
    # A conditional that returns the tree copies what its branch leaves unchanged. A
    # loop of zero iterations or one updates a fragment in place.
    for q in indices:

        def write(_: int, carry: tuple, q: int = q) -> tuple:
            values, shared, local = map(unpack, packed, parts[q])
            results = values, RuleState(shared, local)
            return _update(q, groups[q], carry[0], carry[1], results, context)

        count = jnp.int32(p == q)
        tree, state = jax.lax.fori_loop(0, count, write, (tree, state))
    return tree, state


def _slice_specs(group: list[LeafSlice], specs: PyTree | None) -> list | None:
    """Returns the specs of the leaves of a fragment, which are kept by slices."""
    if specs is None:
        return None
    leaves = jax.tree.leaves(specs)
    return [leaves[leaf_slice.leaf] for leaf_slice in group]


def _slices(
    leaves: list[jax.Array], group: list[LeafSlice], context: SyncContext
) -> list[jax.Array]:
    """Returns the values of a fragment."""
    values = [leaves[leaf_slice.leaf] for leaf_slice in group]
    if all(leaf_slice.axis is None for leaf_slice in group):
        return values
    specs = _slice_specs(group, context.specs)

    def slice_pieces(context: SyncContext, pieces: list) -> list:
        del context
        return list(map(_slice, pieces, group))

    return on_pieces(slice_pieces, context, specs, specs)(values)


def _update_slices(
    leaves: list[jax.Array],
    group: list[LeafSlice],
    values: list[jax.Array],
    context: SyncContext,
) -> list[jax.Array]:
    """Returns the leaves of a fragment with new values."""
    if all(leaf_slice.axis is None for leaf_slice in group):
        return values

    def update_pieces(context: SyncContext, pieces: list, values: list) -> list:
        del context
        return list(map(_update_slice, pieces, group, values))

    old = [leaves[leaf_slice.leaf] for leaf_slice in group]
    return on_pieces(update_pieces, context, context.specs, context.specs)(old, values)


def _slice(leaf: jax.Array, leaf_slice: LeafSlice) -> jax.Array:
    """Returns a slice of a leaf."""
    if leaf_slice.axis is None:
        return leaf
    return jax.lax.slice_in_dim(
        leaf, leaf_slice.start, leaf_slice.stop, axis=leaf_slice.axis
    )


def _update_slice(
    leaf: jax.Array, leaf_slice: LeafSlice, values: jax.Array
) -> jax.Array:
    """Replaces a slice of a leaf."""
    if leaf_slice.axis is None:
        return values
    return jax.lax.dynamic_update_slice_in_dim(
        leaf, values, leaf_slice.start, leaf_slice.axis
    )


def _replace_item(items: tuple, index: int, item: PyTree) -> tuple:
    """Replaces one item of a tuple."""
    return (*items[:index], item, *items[index + 1 :])


def _balanced(tree: PyTree, n: int) -> list[list[LeafSlice]]:
    """Balances complete leaves by bytes: largest first, into the smallest fragment."""
    groups = [[] for _ in range(n)]
    _add_to_smallest(groups, [0] * n, enumerate(map(_num_bytes, jax.tree.leaves(tree))))
    return [sorted(group) for group in groups]


def _add_to_smallest(
    groups: list[list[LeafSlice]], totals: list[int], leaves: Iterable[tuple[int, int]]
) -> None:
    """Adds leaves, largest first, to the fragment with the fewest bytes.

    Args:
      groups: slices of each fragment, extended in place.
      totals: bytes of each fragment, updated in place.
      leaves: pairs of leaf index and bytes.
    """
    for leaf, size in sorted(leaves, key=lambda pair: -pair[1]):
        p = totals.index(min(totals))
        groups[p].append(LeafSlice(leaf))
        totals[p] += size


def _contiguous(tree: PyTree, n: int, axis: int) -> list[list[LeafSlice]]:
    """Fills fragments in order; splits leaves along an axis at fragment boundaries."""
    leaves = jax.tree.leaves(tree)
    bytes_per_fragment = sum(map(_num_bytes, leaves)) / n
    groups, bytes_before = [[] for _ in range(n)], 0
    for i, leaf in enumerate(leaves):
        shape = jnp.shape(leaf)
        divisible = len(shape) > axis and shape[axis] > 1
        count = shape[axis] if divisible else 1
        row_bytes = _num_bytes(leaf) / count
        # Row j belongs to the fragment that contains its midpoint.
        owners = [
            min(int((bytes_before + (j + 0.5) * row_bytes) / bytes_per_fragment), n - 1)
            for j in range(count)
        ]
        for p in sorted(set(owners)):
            start, stop = owners.index(p), count - owners[::-1].index(p)
            complete = not divisible or stop - start == count
            groups[p].append(
                LeafSlice(i) if complete else LeafSlice(i, axis, start, stop)
            )
        bytes_before += _num_bytes(leaf)
    return groups


def _by_layer(tree: PyTree, n: int) -> list[list[LeafSlice]]:
    """Assigns layer i to fragment i mod n and other leaves to the smallest fragment."""
    groups, totals, unnumbered = [[] for _ in range(n)], [0] * n, []
    for i, (path, leaf) in enumerate(jax.tree.leaves_with_path(tree)):
        if number := _NUMBER.search(_path_name(path)):
            p = int(number[0]) % n
            groups[p].append(LeafSlice(i))
            totals[p] += _num_bytes(leaf)
        else:
            unnumbered.append((i, _num_bytes(leaf)))
    _add_to_smallest(groups, totals, unnumbered)
    return [sorted(group) for group in groups]


def _by_user_function(
    tree: PyTree, n: int, function: Callable[[str], int]
) -> list[list[LeafSlice]]:
    """Assigns leaves by a user function of their path."""
    groups = [[] for _ in range(n)]
    for i, (path, _) in enumerate(jax.tree.leaves_with_path(tree)):
        p, name = function(_path_name(path)), _path_name(path)
        text = f"it must return a fragment from 0 to {n - 1} for {name!r}"
        is_index = isinstance(p, numbers.Integral) and p in range(n)
        check(is_index, "fragment(grouping)", text, describe(p))
        groups[p].append(LeafSlice(i))
    return groups


def _path_name(path: tuple) -> str:
    """Formats the path of a leaf, such as "layers.3.w"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _num_bytes(leaf: jax.Array) -> int:
    """Returns the size of a leaf in bytes."""
    return math.prod(jnp.shape(leaf)) * jnp.result_type(leaf).itemsize
