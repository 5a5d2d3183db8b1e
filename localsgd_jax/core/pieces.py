"""Pieces of leaves, for workers that are sharded over several devices.

A piece is the part of a leaf that one device holds. Operations that mix the numbers of
a leaf, such as its concatenation with others, run on pieces: on complete leaves they
would gather them on every device. The only module outside `execution` that uses
shard_map.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh

from localsgd_jax.core.pytrees import ravel, unravel
from localsgd_jax.core.types import PyTree, RuleState, Sharded, SyncContext

# A function of vectors needs several times the memory of a vector, and compile time
# grows with the number of vectors.
NUM_VECTORS = 8
MIN_VECTOR_LIMIT = 2**24


class Piece(NamedTuple):
    """The device at which a function of pieces runs.

    Attributes:
      context: context of the rule.
      axes: axes inside a worker that shard the leaves, sorted.
      sizes: number of elements of the piece of each leaf in the vectors.
      number: number of this vector among those of its group, from 0.
    """

    context: SyncContext
    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    number: int = 0

    @property
    def count(self) -> int:
        """Number of different pieces of a leaf."""
        return math.prod(map(jax.lax.axis_size, self.axes))

    @property
    def index(self) -> jax.Array:
        """Index of this piece, an int32 scalar."""
        index = jnp.int32(0)
        for axis in self.axes:
            index = index * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
        return index

    def sum(self, x: jax.Array) -> jax.Array:
        """Sums over the pieces."""
        return jax.lax.psum(x, self.axes) if self.axes else x


def map_vectors(
    function: Callable,
    context: SyncContext,
    *trees: PyTree,
    num_vectors: int = NUM_VECTORS,
) -> tuple[PyTree, ...]:
    """Applies a function of vectors to the concatenated pieces of trees.

    The leaves are grouped by the axes inside a worker that shard them, since replicas
    of a leaf stay equal only if nothing else is mixed into them. The pieces of a group
    are concatenated to vectors of float32 at least: one vector up to 2²⁴ numbers, and
    otherwise vectors that end with a leaf and have an eighth of all numbers at most,
    or one leaf.

    Args:
      function: `function(piece, *vectors) -> vectors`, a tuple of any length; each
        result has the shape of the arguments. It runs once for each vector.
      context: context of the calling rule, whose `specs` describe the trees.
      *trees: trees of equal structure and shapes.
      num_vectors: 8, or another number; 1 for a single vector of any size.

    Returns:
      A tree for each result, with the structure and dtypes of the first tree.
    """
    structure = jax.tree.structure(trees[0])
    leaves = list(map(jax.tree.leaves, trees))
    results = [()] * structure.num_leaves

    def run(axes: tuple[str, ...], context: SyncContext, *pieces: list) -> list:
        outputs = []
        for number, part in enumerate(_split_leaves(pieces[0], num_vectors)):
            columns = [tree[part] for tree in pieces]
            piece = Piece(context, axes, tuple(x.size for x in columns[0]), number)
            vectors = function(piece, *map(ravel, columns))
            unraveled = [unravel(vector, columns[0]) for vector in vectors]
            outputs += zip(*unraveled, strict=True)
        return outputs

    for axes, indices in _groups(context.specs, len(leaves[0])).items():
        specs = _select_specs(context.specs, indices)
        chosen = [[tree[i] for i in indices] for tree in leaves]
        outputs = on_pieces(partial(run, axes), context, specs, specs)(*chosen)
        for i, output in zip(indices, outputs, strict=True):
            results[i] = output
    return tuple(map(structure.unflatten, zip(*results, strict=True)))


def sum_over_vectors(function: Callable, context: SyncContext, tree: PyTree) -> PyTree:
    """Sums a function of vectors over the pieces and groups of a tree.

    Args:
      function: `function(piece, vector) -> result`, an array.
      context: context of the calling rule, whose `specs` describe the tree.
      tree: any tree with at least one leaf.

    Returns:
      The sum, equal on all devices of a worker. Leaves that are replicated inside a
      worker count once.
    """
    leaves = jax.tree.leaves(tree)

    def run(axes: tuple[str, ...], context: SyncContext, pieces: list) -> jax.Array:
        piece = Piece(context, axes, tuple(x.size for x in pieces))
        return piece.sum(function(piece, ravel(pieces)))

    return sum(
        on_pieces(
            partial(run, axes), context, _select_specs(context.specs, indices), P()
        )([leaves[i] for i in indices])
        for axes, indices in _groups(context.specs, len(leaves)).items()
    )


def concatenate(tree: PyTree, context: SyncContext) -> tuple[dict, dict | None]:
    """Concatenates the pieces of leaves with the same dtype and the same axes.

    Args:
      tree: any tree of arrays.
      context: its `specs` describe the tree.

    Returns:
      Vectors by name, such as "float32" and "float32 fsdp". A vector of sharded leaves
      consists of one block per device. Also their `PartitionSpec`s; None without
      `specs`.
    """
    leaves = list(map(jnp.asarray, jax.tree.leaves(tree)))
    vectors, vector_specs = {}, {}
    for name, (axes, indices) in group_leaves(leaves, context.specs).items():
        vector_specs[name] = vector_spec(axes)
        vectors[name] = on_pieces(
            lambda _, pieces: jnp.concatenate([x.reshape(-1) for x in pieces]),
            context,
            _select_specs(context.specs, indices),
            vector_specs[name],
        )([leaves[i] for i in indices])
    return vectors, None if context.specs is None else vector_specs


def split(vectors: Mapping[str, jax.Array], tree: PyTree, context: SyncContext):
    """Splits the vectors of `concatenate` into leaves.

    Args:
      vectors: by name.
      tree: gives structure, shapes and dtypes.
      context: its `specs` describe the tree.

    Returns:
      A tree with the structure, shapes and dtypes of `tree`.
    """
    leaves, structure = jax.tree.flatten(tree)
    arrays = list(map(jnp.asarray, leaves))
    for name, (axes, indices) in group_leaves(arrays, context.specs).items():
        specs = _select_specs(context.specs, indices)
        new = on_pieces(
            lambda _, vector, like: unravel(vector, like),
            context,
            None if specs is None else (vector_spec(axes), specs),
            specs,
        )(vectors[name], [arrays[i] for i in indices])
        for i, leaf in zip(indices, new, strict=True):
            leaves[i] = leaf
    return structure.unflatten(leaves)


def on_pieces(
    function: Callable, context: SyncContext, in_specs: PyTree, out_specs: PyTree
) -> Callable:
    """Makes a function that runs on the pieces of each device.

    Args:
      function: `function(context, *pieces) -> pieces`.
      context: context of the calling rule. Without `specs` the pieces are the complete
        arrays.
      in_specs: specs of one argument, which hold for all arguments, or a tuple of the
        specs of each; trees of `PartitionSpec`s over the axes inside a worker.
      out_specs: specs of the results, a tree prefix.

    Returns:
      A function of complete arrays, in which nothing is sent along axes inside a
      worker unless `function` does so.
    """
    if context.specs is None:
        return partial(function, context)
    # A Python int selects among programs and must not become an array.
    is_static = isinstance(context.round, int)
    arrays = (context.weight, None if is_static else context.round)

    def run(arrays: tuple, arguments: tuple) -> PyTree:
        weight, number = arrays
        number = context.round if is_static else number
        return function(context._replace(weight=weight, round=number), *arguments)

    def call(*arguments: PyTree) -> PyTree:
        specs = (
            in_specs if isinstance(in_specs, tuple) else (in_specs,) * len(arguments)
        )
        mapped = jax.shard_map(
            run,
            in_specs=(P(), specs),
            out_specs=out_specs,
            axis_names=set(inner_axes()),
            check_vma=False,
        )
        return mapped(arrays, arguments)

    return call


def piece_shapes(tree: PyTree, specs: PyTree | None) -> PyTree:
    """Returns the shapes of the pieces of leaves, as `jax.ShapeDtypeStruct`s.

    Args:
      tree: leaves with shapes and dtypes.
      specs: `PartitionSpec` of each leaf; None if leaves are not sharded.

    Returns:
      A tree with the structure of `tree`.
    """
    shapes = jax.eval_shape(lambda tree: tree, tree)
    if specs is None:
        return shapes
    sizes = inner_axes()

    def piece(x: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
        factors = [math.prod(sizes[name] for name in _names(entry)) for entry in spec]
        factors += [1] * (len(x.shape) - len(factors))
        shape = tuple(n // k for n, k in zip(x.shape, factors, strict=True))
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(piece, shapes, specs)


def inner_axes() -> dict[str, int]:
    """Returns the sizes of the axes inside a worker, by the ambient mesh."""
    mesh = get_abstract_mesh()
    manual = set(mesh.manual_axes)
    return {name: size for name, size in mesh.shape.items() if name not in manual}


def vector_spec(axes: tuple[str, ...]) -> P:
    """Returns the `PartitionSpec` of a vector with one block for each piece."""
    if not axes:
        return P()
    return P(axes[0] if len(axes) == 1 else axes)


def infer_specs(tree: PyTree, like: PyTree, specs: PyTree | None) -> PyTree | None:
    """Returns the `PartitionSpec`s of state that mirrors a sharded tree.

    A leaf, such as a moment of an optimizer, is sharded as the leaf of `like` that has
    its shape and whose path is the end of its own path. Without such a leaf it is
    sharded as the leaves of its shape if these are all sharded alike, and is otherwise
    replicated.

    Args:
      tree: leaves with shapes.
      like: leaves with shapes.
      specs: `PartitionSpec` of each leaf of `like`; None if leaves are not sharded.

    Returns:
      A tree with the structure of `tree`; None if `specs` is None.

    Example:
      >>> like = {"a": jnp.zeros((4, 4)), "b": jnp.zeros((4, 4))}
      >>> state = {"step": jnp.zeros(()), "mu": like}
      >>> infer_specs(state, like, {"a": P("fsdp"), "b": P(None, "fsdp")})
      {'mu': {'a': P('fsdp',), 'b': P(None, 'fsdp')}, 'step': P()}
    """
    if specs is None:
        return None
    by_path: dict[tuple, tuple] = {}
    by_shape: dict[tuple, set] = {}
    paths_and_leaves = jax.tree.leaves_with_path(like)
    for (path, x), spec in zip(paths_and_leaves, jax.tree.leaves(specs), strict=True):
        by_path[_path_names(path)] = jnp.shape(x), spec
        by_shape.setdefault(jnp.shape(x), set()).add(spec)

    def infer(path: tuple, x: jax.Array) -> P:
        shape, names = jnp.shape(x), _path_names(path)
        for start in range(len(names) + 1):
            found_shape, spec = by_path.get(names[start:], (None, P()))
            if found_shape == shape:
                return spec
        candidates = by_shape.get(shape, set())
        return next(iter(candidates)) if len(candidates) == 1 else P()

    return jax.tree.map_with_path(infer, tree)


def with_specs(state: RuleState, like: PyTree, specs: PyTree | None) -> RuleState:
    """Adds the partition inside a worker to the initial state of a rule.

    Args:
      state: from `init` of a rule.
      like: the tree that the rule received.
      specs: `PartitionSpec` of each leaf of `like`; None if leaves are not sharded.

    Returns:
      The state, both parts `Sharded`; parts that are so already keep their specs.
    """
    if specs is None:
        return state

    def annotate(part: PyTree) -> Sharded:
        leaves, structure = jax.tree.flatten(part, is_leaf=_is_sharded)
        # A scalar stands for each annotated part.
        scalars = [np.float32(0) if _is_sharded(x) else x for x in leaves]
        inferred = jax.tree.leaves(
            infer_specs(structure.unflatten(scalars), like, specs)
        )
        all_specs: list[P] = []
        for leaf, spec in zip(leaves, inferred, strict=True):
            all_specs += leaf.specs if _is_sharded(leaf) else (spec,)
        return Sharded(unwrap(part), all_specs)

    return RuleState(*map(annotate, state))


def unwrap(part: PyTree) -> PyTree:
    """Returns a part of a rule state without `Sharded`."""
    return jax.tree.map(
        lambda x: x.tree if _is_sharded(x) else x, part, is_leaf=_is_sharded
    )


def _is_sharded(x: object) -> bool:
    """Returns whether a part of a rule state has specs."""
    return isinstance(x, Sharded)


def _split_leaves(leaves: Sequence[jax.Array], num_vectors: int) -> list[slice]:
    """Splits a list of leaves into the parts that make up one vector each."""
    limit = max(MIN_VECTOR_LIMIT, sum(x.size for x in leaves) // num_vectors)
    starts, size = [0], 0
    for i, x in enumerate(leaves):
        if size and size + x.size > limit:
            starts.append(i)
            size = 0
        size += x.size
    return list(map(slice, starts, [*starts[1:], len(leaves)]))


def _groups(specs: PyTree | None, count: int) -> dict[tuple[str, ...], list[int]]:
    """Groups the indices of leaves by the axes that shard them."""
    if specs is None:
        return {(): list(range(count))}
    groups = {}
    for i, spec in enumerate(jax.tree.leaves(specs)):
        groups.setdefault(_axes(spec), []).append(i)
    return groups


def group_leaves(
    leaves: Sequence[jax.Array], specs: PyTree | None
) -> dict[str, tuple[tuple[str, ...], list[int]]]:
    """Groups the indices of leaves by dtype and by the axes that shard them.

    Args:
      leaves: arrays.
      specs: `PartitionSpec` of each leaf, as a tree; None if leaves are not sharded.

    Returns:
      Axes and indices by name, such as "float32" and "float32 fsdp".
    """
    groups = {}
    for axes, indices in _groups(specs, len(leaves)).items():
        for i in indices:
            name = " ".join((leaves[i].dtype.name, *axes))
            groups.setdefault(name, (axes, []))[1].append(i)
    return groups


def _select_specs(specs: PyTree | None, indices: Sequence[int]) -> list[P] | None:
    """Returns the specs of some leaves."""
    if specs is None:
        return None
    leaves = jax.tree.leaves(specs)
    return [leaves[i] for i in indices]


def _axes(spec: P) -> tuple[str, ...]:
    """Returns the axes in a spec, sorted."""
    return tuple(sorted(name for entry in spec for name in _names(entry)))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the axes in one entry of a spec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _path_names(path: tuple) -> tuple[str, ...]:
    """Returns the keys of a path as strings, whatever the kind of container."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
