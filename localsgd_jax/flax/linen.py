"""Adapter for training steps on a Flax linen TrainState."""

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from localsgd_jax.core.algorithm import Rules, from_train_step
from localsgd_jax.core.prng_keys import forbid_raw_keys
from localsgd_jax.core.types import Algorithm, PyTree
from localsgd_jax.core.validation import check_rules, check_type, describe
from localsgd_jax.flax.default_rules import add_default_rules


def from_linen(
    train_step: Callable, train_state: PyTree, rule: Rules = None
) -> tuple[Algorithm, PyTree]:
    """Converts a linen training step to a Local SGD algorithm.

    Default rule of each field, unless overridden by `rule`:

    - `params`: the given rule, or the mean.
    - `batch_stats`, if present: merged by `merge_batch_stats()`.
    - all other fields, such as `opt_state` and `step`: not synchronised.
    - typed PRNG keys in any field: different for each worker. Folded with `step` they
      give dropout masks that differ between workers and between steps.

    Args:
      train_step: `train_step(train_state, batch) -> (train_state, metrics)`, written
        for one worker, with any result that `from_train_step` accepts; metrics may be
        a scalar loss or a dict.
      train_state: a Flax `TrainState` or an instance of a subclass.
      rule: rule for `params`, or a dict from field to rule; None for `average()`.

    Returns:
      An algorithm for `simulate` or `on_mesh`, and the train state for its `init`.
      `consensus(state, None)` returns a train state of the same type.

    Raises:
      TypeError: if an argument has the wrong type, or the state contains a raw PRNG
        key, which would be equal on all workers.
      ValueError: if a rule names a field that the state does not have.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> from flax import linen as nn
      >>> from flax.training.train_state import TrainState
      >>> from localsgd_jax.flax import from_linen
      >>> model = nn.Dense(1)
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
      >>> start = TrainState.create(
      ...     apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
      >>> def train_step(state, batch):
      ...     def loss_fn(params):
      ...         return jnp.mean(state.apply_fn({"params": params}, batch) ** 2)
      ...     loss, grads = jax.value_and_grad(loss_fn)(state.params)
      ...     return state.apply_gradients(grads=grads), loss
      >>> algorithm, start = from_linen(train_step, start)
      >>> cluster = lsgd.simulate(algorithm, workers=4)
      >>> state, loss = cluster.step(cluster.init(start), jnp.ones((4, 2, 3)))
      >>> lsgd.consensus(cluster.sync(state), None).params["kernel"].shape
      (3, 1)
    """
    check_type("from_linen(train_step)", "train_step", train_step, Callable)
    check_rules("from_linen(rule)", rule)
    is_state = hasattr(train_state, "_fields") or isinstance(train_state, Mapping)
    if not (is_state or is_dataclass(train_state)) or isinstance(train_state, type):
        raise TypeError(
            "from_linen(train_state): train_state must be a Flax TrainState, got "
            f"{describe(train_state)}"
        )
    rules = add_default_rules(train_state, rule)
    forbid_raw_keys("from_linen(train_state)", train_state)
    algorithm = from_train_step(train_step, rules)
    specs = _partition_specs(train_state)
    return algorithm._replace(partition_specs=specs), train_state


def _partition_specs(train_state: PyTree) -> Callable | None:
    """Returns the function for the metadata of all leaves; None without boxes."""
    boxes = jax.tree.leaves(train_state, is_leaf=_is_box)
    if not any(map(_is_box, boxes)):
        return None
    from flax.core.spmd import get_logical_axis_rules
    from flax.linen import spmd

    rules_here = get_logical_axis_rules()

    def spec(node: Any) -> PartitionSpec | None:
        if not _is_box(node):
            return None
        names = node.get_partition_spec()
        if not isinstance(node, spmd.LogicallyPartitioned):
            return names
        rules = [*(node.rules or ()), *(rules_here or get_logical_axis_rules())]
        return spmd.logical_to_mesh_axes(names, rules) if rules else names

    def partition_specs(state: PyTree) -> list:
        nodes = jax.tree.leaves(state, is_leaf=_is_box)
        return [spec(node) for node in nodes for _ in jax.tree.leaves(node)]

    return partition_specs


def _is_box(x: object) -> bool:
    """Returns whether a pytree node has partitioning metadata."""
    return hasattr(x, "get_partition_spec")
