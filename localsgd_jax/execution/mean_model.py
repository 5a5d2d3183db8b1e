"""Mean model over workers."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from localsgd_jax.core import train_state
from localsgd_jax.core.pytrees import promote
from localsgd_jax.core.static_leaves import restore_static
from localsgd_jax.core.types import PyTree, State
from localsgd_jax.core.validation import check_names, check_state
from localsgd_jax.distributed import arrays
from localsgd_jax.execution.ambient_mesh import in_mesh_of_state
from localsgd_jax.execution.merged_nodes import is_merged_as_a_unit, merge_unit


@in_mesh_of_state
def consensus(state: State, field: str | Sequence[str] | None = "params") -> PyTree:
    """Returns the mean model over workers.

        x̄ = (1/K) Σₖ xₖ

    The mean is accumulated in float32 or wider. Leaves without a mean (integers, PRNG
    keys) are taken from worker 0. Metrics in the state, such as `clu.metrics` and
    `NnxMetrics`, are merged into those of all workers, and of a Flax `DynamicScale`
    the one with the smallest scale is taken. If the state spans several processes, all
    of them must call `consensus`; each returns its own copy.

    Args:
      state: state of a cluster, synchronised or not.
      field: the field of the train state that holds the model; for several names a
        dict of them; for None the whole train state.

    Returns:
      The model, without worker axis.

    Raises:
      TypeError: if `state` is not a `State`, or `field` no name.
      ValueError: if the train state has no such field, or the state was donated.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5))
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> state, _ = cluster.step(cluster.init(jnp.zeros(())), jnp.array([1.0, 3.0]))
      >>> consensus(state)
      Array(2., dtype=float32)
    """
    check_state("consensus(state)", state)
    if field is not None:
        check_names("consensus(field)", "field", field)
    fields = select_fields(state.workers, field)
    mean = arrays.local_replica(mean_over_workers(fields))
    return in_order(restore_static(mean), field)


@in_mesh_of_state
def common_model(
    state: State, field: str | Sequence[str] | None = "params"
) -> PyTree | None:
    """Returns the model of one worker if the models of all workers are equal.

        x₁ if x₁ = … = x_K

    Two 32-bit checksums of each worker are compared, which is all that workers send.
    Each device keeps the values of its own worker, so that no parameters are sent. If
    the state spans several processes, all of them must call `common_model`.

    Args:
      state: state of a cluster.
      field: as in `consensus`.

    Returns:
      The model, without worker axis, placed as by `consensus`; None if workers differ
      or the fields hold metrics.

    Raises:
      ValueError: if the train state has no such field.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5))
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> state, _ = cluster.step(cluster.init(jnp.zeros(())), jnp.array([1.0, 3.0]))
      >>> common_model(state), common_model(cluster.sync(state))
      (None, Array(2., dtype=float32))
    """
    fields = select_fields(state.workers, field)
    nodes = jax.tree.leaves(fields, is_leaf=is_merged_as_a_unit)
    if any(map(is_merged_as_a_unit, nodes)):
        return None
    if not bool(arrays.local_replica(_workers_are_equal(fields))):
        return None
    return in_order(restore_static(arrays.local_replica(_first_rows(fields))), field)


def select_fields(workers: PyTree, field: str | Sequence[str] | None) -> PyTree:
    """Returns the fields of the train state averaged by `consensus`.

    Args:
      workers: train state.
      field: as in `consensus`.

    Returns:
      The field; for several names a dict of them; for None the whole train state.

    Raises:
      ValueError: if the train state has no such field.
    """
    if field is None:
        return workers
    if isinstance(field, str):
        return train_state.get_fields(workers, (field,))[field]
    return train_state.get_fields(workers, tuple(field))


def in_order(values: PyTree, field: str | Sequence[str] | None) -> PyTree:
    """Returns a dict of fields in the order of their names in `field`.

    The result of a jitted function is sorted by name.

    Args:
      values: result for `field`.
      field: as in `consensus`.

    Returns:
      A dict if `field` holds several names, else the values.
    """
    if field is None or isinstance(field, str):
        return values
    return {name: values[name] for name in field}


@jax.jit
def mean_over_workers(tree: PyTree) -> PyTree:
    """Averages leaves over the worker axis; integers and keys keep row 0."""
    return jax.tree.map(_merge_node, tree, is_leaf=is_merged_as_a_unit)


def _merge_node(node: PyTree) -> PyTree:
    """Merges the rows of a leaf, or of a node that is merged as a unit."""
    if is_merged_as_a_unit(node):
        return merge_unit(node)
    if not jnp.issubdtype(node.dtype, jnp.inexact):
        return node[0]
    return jnp.mean(promote(node), axis=0).astype(node.dtype)


@jax.jit
def _workers_are_equal(tree: PyTree) -> jax.Array:
    """Returns whether the checksums of all rows of the worker axis are equal."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.bool_(True)
    total = jnp.uint32(0)
    for leaf in leaves:
        # The multiplier makes the sum depend on the order of the leaves.
        total = total * jnp.uint32(1000003) + _checksums(leaf)
    return jnp.all(total == total[:1])


def _checksums(x: jax.Array) -> jax.Array:
    """Returns two checksums of each row, `(K, 2)` uint32: plain and weighted sum."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return _checksums(jax.random.key_data(x))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _checksums(x.real) + jnp.uint32(31) * _checksums(x.imag)
    if x.dtype == bool:
        bits = x.astype(jnp.uint32)
    else:
        width = min(x.dtype.itemsize, 4)
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}"))
        bits = bits.astype(jnp.uint32)
    inner = tuple(range(1, bits.ndim))
    # Sums over each axis keep the sharding inside a worker; a flat index would not.
    index = jnp.uint32(1)
    for axis in inner:
        position = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index = (index + position) * jnp.uint32(2654435761)
    weights = (index ^ (index >> 15)) | 1
    return jnp.stack([jnp.sum(bits, inner), jnp.sum(bits * weights, inner)], axis=1)


def _first_rows(tree: PyTree) -> PyTree:
    """Returns the first row of the worker axis on each device, as the row of all."""
    leaves, structure = jax.tree.flatten(tree)
    shardings = [leaf.sharding for leaf in leaves]
    if not all(isinstance(x, NamedSharding) and x.spec for x in shardings):
        return jax.tree.map(lambda x: x[0], tree)
    specs = tuple(sharding.spec for sharding in shardings)
    return structure.unflatten(
        _first_row_of_positions(shardings[0].mesh, specs)(leaves)
    )


@functools.lru_cache(maxsize=8)
def _first_row_of_positions(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Callable:
    """Makes a function that declares the first rows of all positions to be equal.

    Args:
      mesh: mesh of the leaves.
      specs: specs of the leaves, each with the same worker axes first.

    Returns:
      A function of the list of leaves; their rows keep their sharding inside a worker.
    """
    names = specs[0][0] or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    first_rows = jax.shard_map(
        lambda leaves: [leaf[0] for leaf in leaves],
        mesh=mesh,
        axis_names=set(names),
        in_specs=PartitionSpec(names),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    inner = [NamedSharding(mesh, PartitionSpec(*spec[1:])) for spec in specs]
    return jax.jit(first_rows, out_shardings=inner)
