"""Replacement of a field of the train state of all workers."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from localsgd_jax.core import train_state
from localsgd_jax.core.pytrees import is_key
from localsgd_jax.core.types import PyTree, State
from localsgd_jax.core.validation import (
    check,
    check_array_leaves,
    check_state,
    check_type,
)
from localsgd_jax.distributed import arrays
from localsgd_jax.execution.ambient_mesh import in_mesh_of_state
from localsgd_jax.execution.replication import fold_in_workers


@in_mesh_of_state
def replace_field(state: State, field: str, value: PyTree) -> State:
    """Replaces a field of the train state of all workers.

        sₖ.field ← value,  k = 1, …, K

    It resets metrics that are in the train state, for example at the end of an epoch,
    when the host resets its own.

    Args:
      state: state of a cluster; it is not donated.
      field: name of a field of the train state.
      value: the field of one worker, with the structure, shapes and dtypes of the
        present one. A typed PRNG key becomes a different key for each worker.

    Returns:
      The state with the field replaced. Shardings are kept.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if the train state has no such field, the value has another structure,
        shape or dtype, or the state was donated.

    Example:
      >>> import jax.numpy as jnp
      >>> import localsgd_jax as lsgd
      >>> def train_step(state, batch):
      ...     return {**state, "seen": state["seen"] + batch}
      >>> algorithm = lsgd.from_train_step(train_step, rule=lsgd.average())
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> state = cluster.init({"params": 0.0, "seen": 0})
      >>> state, _ = cluster.step(state, jnp.array([1, 2]))
      >>> lsgd.replace_field(state, "seen", 0).workers["seen"]
      Array([0, 0], dtype=int32)
    """
    check_state("replace_field(state)", state)
    check_type("replace_field(field)", "field", field, str)
    names = train_state.field_names(state.workers)
    text = f"field must be a field of the train state, {names}"
    check(field in names, "replace_field(field)", text, repr(field))
    old = train_state.get_fields(state.workers, (field,))[field]
    check_array_leaves("replace_field(value)", "value", value)
    value = jax.tree.map(jnp.asarray, value)
    _check_same_form(field, old, value)
    value = jax.tree.map(_replicate_like, old, value)
    shardings = jax.tree.map(lambda x: x.sharding, old)
    repeat = jax.jit(partial(_repeat, old), out_shardings=shardings)
    workers = train_state.replace_fields(state.workers, {field: repeat(value)})
    return state._replace(workers=workers)


def _replicate_like(old: jax.Array, x: jax.Array) -> jax.Array:
    """Copies a value to the devices of the present field."""
    if not isinstance(old.sharding, NamedSharding):
        return x
    sharding = NamedSharding(old.sharding.mesh, PartitionSpec())
    return arrays.device_put_global(x, sharding)


def _repeat(old: PyTree, value: PyTree) -> PyTree:
    """Repeats the leaves of a value for each worker of the old leaves."""

    def leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        if is_key(y):
            return fold_in_workers(y, jnp.arange(x.shape[0]))
        return jnp.broadcast_to(y.astype(x.dtype), x.shape)

    return jax.tree.map(leaf, old, value)


def _check_same_form(field: str, old: PyTree, value: PyTree) -> None:
    """Raises a ValueError unless the value is like the field of one worker."""
    one_worker = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), old)
    expected, given = map(_describe, (one_worker, value))
    if expected != given:
        raise ValueError(
            f"replace_field(value): value must be like the field {field!r} of one "
            f"worker, {expected}, got {given}"
        )


def _describe(tree: PyTree) -> str:
    """Formats structure, shapes and dtypes of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    forms = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves]
    return str(structure.unflatten(forms))
