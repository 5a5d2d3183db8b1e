"""Buckets of small leaves for all-reduces."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from localsgd_jax.core.pieces import concatenate, group_leaves, piece_shapes, split
from localsgd_jax.core.types import PyTree, SyncContext

# A small leaf is copied faster than one more collective of CPU devices starts; XLA
# compiles a longer concatenation disproportionately longer.
MAX_LEAF_BYTES = 32 * 1024
LEAVES_PER_BUCKET = 32
MIN_LEAVES = 16


class Buckets(NamedTuple):
    """Vectors of small leaves, and the other leaves.

    Attributes:
      vectors: one or several vectors per bucket, by name.
      others: leaves that are in no bucket.
    """

    vectors: list[dict[str, jax.Array]]
    others: list[jax.Array]


def map_buckets(
    function: Callable[[PyTree], PyTree], tree: PyTree, context: SyncContext
) -> PyTree:
    """Applies an elementwise function to buckets of small leaves and to other leaves.

    A bucket holds up to 32 leaves of at most 32 KiB per device, of one dtype and
    sharded over the same axes inside a worker. Each device concatenates its pieces, so
    nothing is gathered. With fewer than 16 small leaves there are no buckets.

    Args:
      function: from a tree of arrays to a tree of the same structure and shapes,
        elementwise, such as an all-reduce. It is called once.
      tree: arrays.
      context: context of the calling rule; its `specs` describe the tree.

    Returns:
      A tree with the structure of `tree`.
    """
    leaves, structure = jax.tree.flatten(tree)
    specs = None
    if context.specs is not None:
        specs, specs_structure = jax.tree.flatten(context.specs)
        if specs_structure != structure:
            return function(tree)
    groups = _assign(leaves, specs)
    if not groups:
        return function(tree)
    in_buckets = {i for group in groups for i in group}
    others = [i for i in range(len(leaves)) if i not in in_buckets]
    parts = [
        ([leaves[i] for i in group], _select(context, specs, group)) for group in groups
    ]
    # Without the barrier XLA fuses what makes the leaves into the concatenation,
    # which selects among all leaves for each number.
    vectors = [
        concatenate(jax.lax.optimization_barrier(part), part_context)[0]
        for part, part_context in parts
    ]
    new = function(Buckets(vectors, [leaves[i] for i in others]))
    for i, leaf in zip(others, new.others, strict=True):
        leaves[i] = leaf
    for group, (part, part_context), vector in zip(
        groups, parts, new.vectors, strict=True
    ):
        for i, leaf in zip(group, split(vector, part, part_context), strict=True):
            leaves[i] = leaf
    return structure.unflatten(leaves)


def _assign(leaves: Sequence[jax.Array], specs: list | None) -> list[list[int]]:
    """Returns the indices of the leaves of each bucket."""
    shapes = piece_shapes(list(leaves), specs)
    is_small = [x.size * x.dtype.itemsize <= MAX_LEAF_BYTES for x in shapes]
    if sum(is_small) < MIN_LEAVES:
        return []
    small = [
        [i for i in indices if is_small[i]]
        for _, indices in group_leaves(leaves, specs).values()
    ]
    return [
        group[start : start + LEAVES_PER_BUCKET]
        for group in small
        for start in range(0, len(group), LEAVES_PER_BUCKET)
    ]


def _select(
    context: SyncContext, specs: list | None, indices: Sequence[int]
) -> SyncContext:
    """Returns the context with the specs of some leaves."""
    return context._replace(specs=specs and [specs[i] for i in indices])
