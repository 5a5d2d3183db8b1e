"""Adapter for training steps on a Flax NNX model and optimizer."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax

from localsgd_jax.core.algorithm import from_train_step
from localsgd_jax.core.types import Algorithm, PyTree
from localsgd_jax.flax.default_rules import Rules, add_default_rules


class NnxTrainState(NamedTuple):
    """Train state of one worker: NNX model and optimizer as pure dicts.

    Attributes:
      params: variables that the optimizer updates.
      batch_stats: running statistics, `nnx.BatchStat`.
      opt_state: optimizer state, including its step counter.
      other: all other variables, such as PRNG keys and counters of `nnx.Rngs`.
    """

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    other: PyTree


def from_nnx(
    train_step: Callable, model: Any, optimizer: Any, rule: Rules
) -> tuple[Algorithm, NnxTrainState]:
    """Converts an NNX training step to a Local SGD algorithm.

    The fields are those of `NnxTrainState`. Default rule of each field, unless
    overridden by `rule`:

    - `params`, the variables that `optimizer.wrt` selects: the given rule.
    - `batch_stats`, if present: merged by `merge_batch_stats()`.
    - `opt_state` and `other`: not synchronised.
    - PRNG keys of `nnx.Rngs`, which are in `other`: different for each worker; a
      stream folds its counter in at each use.

    Args:
      train_step: `train_step(model, optimizer, batch) -> metrics`, written for one
        worker; it updates the model and the optimizer in place.
      model: an `nnx.Module` in training mode.
      optimizer: an `nnx.Optimizer` of the model.
      rule: rule for `params`, or a dict from field to rule.

    Returns:
      An algorithm for `simulate` or `on_mesh`, and the train state for its `init`,
      from the current values of the model and the optimizer. `update_nnx` writes a
      train state back.

    Raises:
      ImportError: if Flax is not installed.
      ValueError: if a rule names a field that the state does not have.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> from flax import nnx
      >>> from localsgd_jax.flax import from_nnx, update_nnx
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> def train_step(model, optimizer, batch):
      ...     loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(batch) ** 2))(model)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> algorithm, start = from_nnx(train_step, model, optimizer, lsgd.average())
      >>> cluster = lsgd.simulate(algorithm, workers=4)
      >>> state, loss = cluster.step(cluster.init(start), jnp.ones((4, 2, 3)))
      >>> update_nnx(lsgd.consensus(cluster.sync(state), None), model, optimizer)
    """
    nnx = _import_nnx("from_nnx")
    model_graph, start = _split(nnx, model, optimizer)
    optimizer_graph = nnx.graphdef(optimizer)

    def pure_step(state: NnxTrainState, batch: PyTree) -> tuple[NnxTrainState, PyTree]:
        merged = nnx.merge(model_graph, state.params, state.batch_stats, state.other)
        merged_optimizer = nnx.merge(optimizer_graph, state.opt_state)
        metrics = train_step(merged, merged_optimizer, batch)
        return _split(nnx, merged, merged_optimizer)[1], metrics

    algorithm = from_train_step(pure_step, add_default_rules(start, rule))
    specs = _partition_specs(nnx, model, optimizer)
    return algorithm._replace(partition_specs=specs), start


def update_nnx(state: NnxTrainState, model: Any, optimizer: Any = None) -> None:
    """Writes a train state into an NNX model in place.

    Args:
      state: train state without worker axis, such as `consensus(state, None)`.
      model: the model that was passed to `from_nnx`, or one of the same structure.
      optimizer: its optimizer; None leaves the optimizer unchanged.

    Raises:
      ImportError: if Flax is not installed.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> from flax import nnx
      >>> from localsgd_jax.flax import from_nnx, update_nnx
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> step = lambda model, optimizer, batch: 0.0
      >>> _, start = from_nnx(step, model, optimizer, lsgd.average())
      >>> update_nnx(start, model, optimizer)
    """
    nnx = _import_nnx("update_nnx")
    for variables in (state.params, state.batch_stats, state.other):
        nnx.update(model, variables)
    if optimizer is not None:
        nnx.update(optimizer, state.opt_state)


def _split(nnx: ModuleType, model: Any, optimizer: Any) -> tuple[Any, NnxTrainState]:
    """Splits model and optimizer into the model graph and all variables."""
    graph, variables = _variables(nnx, model, optimizer)
    return graph, NnxTrainState(*map(nnx.to_pure_dict, variables))


def _variables(nnx: ModuleType, model: Any, optimizer: Any) -> tuple[Any, list]:
    """Returns the model graph and the variables of each field of the train state."""
    graph, *variables = nnx.split(model, optimizer.wrt, nnx.BatchStat, ...)
    variables.insert(2, nnx.state(optimizer))
    return graph, variables


def _partition_specs(nnx: ModuleType, model: Any, optimizer: Any) -> Callable:
    """Returns the function for the metadata of all variables, by path."""
    _, variables = _variables(nnx, model, optimizer)
    specs = (nnx.to_pure_dict(nnx.get_partition_spec(state)) for state in variables)
    of_path = dict(jax.tree.leaves_with_path(NnxTrainState(*specs)))

    def partition_specs(state: NnxTrainState) -> list:
        return [of_path.get(path) for path, _ in jax.tree.leaves_with_path(state)]

    return partition_specs


def _import_nnx(call: str) -> ModuleType:
    """Imports flax.nnx or raises an ImportError with the install command."""
    try:
        from flax import nnx
    except ImportError:
        raise ImportError(f"{call}() needs flax: pip install flax") from None
    return nnx
