"""Adapter for training steps on Flax NNX models, optimizers and metrics."""

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from localsgd_jax.core.algorithm import Rules, from_train_step
from localsgd_jax.core.prng_keys import forbid_raw_keys
from localsgd_jax.core.types import Algorithm, PyTree, SyncRule
from localsgd_jax.core.validation import check_int, check_rules, check_type, describe
from localsgd_jax.flax.default_rules import add_default_rules
from localsgd_jax.flax.nnx_metrics import NnxMetrics, metric_kinds


class NnxTrainState(NamedTuple):
    """Train state of one worker: NNX objects as pure dicts.

    A field that has variables of several objects is a dict by their positions.

    Attributes:
      params: variables that the optimizers update.
      batch_stats: running statistics, `nnx.BatchStat`.
      opt_state: optimizer state, including its step counter.
      metrics: `NnxMetrics` with the variables of `nnx.Metric` objects; `{}` if there
        are none.
      other: all other variables, such as PRNG keys and counters of `nnx.Rngs`.
    """

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    metrics: PyTree
    other: PyTree


def from_nnx(
    train_step: Callable,
    *objects: Any,
    rule: Rules = None,
    wrt: Any = None,
    batch_argnum: int | None = None,
) -> tuple[Algorithm, NnxTrainState]:
    """Converts an NNX training step to a Local SGD algorithm.

    The fields are those of `NnxTrainState`. Default rule of each field, unless
    overridden by `rule`:

    - `params`: the given rule, or the mean.
    - `batch_stats`, if present: merged by `merge_batch_stats()`.
    - `opt_state`, `metrics` and `other`: not synchronised. `consensus` merges metrics.
    - PRNG keys of `nnx.Rngs`, which are in `other`: different for each worker; a
      stream folds its counter in at each use.

    The objects are one graph, so that they may share variables, as
    `nnx.ModelAndOptimizer` does with its model.

    Args:
      train_step: `train_step(*objects, batch) -> metrics`, written for one worker; it
        updates the objects in place.
      *objects: models in training mode, optimizers, metrics and `nnx.Rngs`, in the
        order of the arguments of `train_step`.
      rule: rule for `params`, or a dict from field to rule; None for
        `average()`.
      wrt: filter of the variables in `params`; by default the filters of all
        `nnx.Optimizer` objects, or `nnx.Param` if there are none.
      batch_argnum: position of the batch among the arguments of `train_step`; None for
        the last one.

    Returns:
      An algorithm for `simulate` or `on_mesh`, and the train state for its `init`,
      from the current values of the objects. `update_nnx` writes a train state back.

    Raises:
      ImportError: if Flax is not installed.
      TypeError: if an argument has the wrong type, the step has another number of
        arguments, or a variable is a raw PRNG key, which would be equal on all workers.
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
      >>> algorithm, start = from_nnx(train_step, model, optimizer)
      >>> cluster = lsgd.simulate(algorithm, workers=4)
      >>> state, loss = cluster.step(cluster.init(start), jnp.ones((4, 2, 3)))
      >>> update_nnx(lsgd.consensus(cluster.sync(state), None), model, optimizer)
    """
    nnx = _import_nnx("from_nnx")
    _check_objects(nnx, "from_nnx", objects)
    _check_step(train_step, objects, batch_argnum)
    check_rules("from_nnx(rule)", rule)
    wrt = _update_filter(nnx, objects) if wrt is None else wrt
    _check_filter(nnx, wrt)
    index = len(objects) if batch_argnum is None else batch_argnum
    graph, variables = _variables(nnx, objects, wrt)
    start, positions = _to_train_state(nnx, objects, variables)
    forbid_raw_keys("from_nnx(*objects)", start)

    def pure_step(state: NnxTrainState, batch: PyTree) -> tuple[NnxTrainState, PyTree]:
        merged = nnx.merge(graph, *_to_variables(state, positions))
        metrics = train_step(*merged[:index], batch, *merged[index:])
        _, new_variables = _variables(nnx, merged, wrt)
        return _to_train_state(nnx, merged, new_variables)[0], metrics

    algorithm = from_train_step(pure_step, add_default_rules(start, rule))
    specs = _partition_specs(nnx, objects, wrt)
    return algorithm._replace(partition_specs=specs), start


def update_nnx(state: NnxTrainState, *objects: Any) -> None:
    """Writes a train state into NNX objects in place.

    Args:
      state: train state without worker axis, such as `consensus(state, None)`.
      *objects: those passed to `from_nnx`, in the same order, or objects of the same
        structure; later ones may be left out, and stay unchanged.

    Raises:
      ImportError: if Flax is not installed.
      TypeError: if an argument has the wrong type.
      ValueError: if the objects have another structure.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> from flax import nnx
      >>> from localsgd_jax.flax import from_nnx, update_nnx
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> step = lambda model, optimizer, batch: 0.0
      >>> _, start = from_nnx(step, model, optimizer)
      >>> update_nnx(start, model, optimizer)
    """
    nnx = _import_nnx("update_nnx")
    check_type("update_nnx(state)", "state", state, NnxTrainState)
    _check_objects(nnx, "update_nnx", objects)
    current = nnx.to_pure_dict(nnx.state(objects))
    for name, field in zip(state._fields, state, strict=True):
        value = field.values if isinstance(field, NnxMetrics) else field
        parts = _by_position(value, current) if value else {}
        if name == "params" and value and not parts:
            raise ValueError(
                "update_nnx(state, *objects): an object must have the variables of "
                f"the field 'params', got {nnx.to_pure_dict(nnx.state(objects)).keys()}"
            )
        for position, part in parts.items():
            nnx.update(objects[position], part)


def _variables(nnx: ModuleType, objects: tuple, wrt: Any) -> tuple[Any, list]:
    """Returns the graph of all objects and the variables of each field."""
    kinds = metric_kinds(nnx, objects)
    is_param = nnx.filterlib.to_predicate(wrt)

    def in_metric(path: tuple, _: Any) -> bool:
        return any(path[: len(metric)] == metric for metric, _ in kinds)

    def in_params(path: tuple, variable: Any) -> bool:
        return is_param(path[1:], variable)

    graph, opt_state, metrics, params, batch_stats, other = nnx.split(
        objects, nnx.OptState, in_metric, in_params, nnx.BatchStat, ...
    )
    return graph, [params, batch_stats, opt_state, metrics, other]


def _to_train_state(
    nnx: ModuleType, objects: tuple, variables: list
) -> tuple[NnxTrainState, list]:
    """Converts variables to a train state and the position of each field's object.

    The position is None for a field with variables of several objects or of none.
    """
    params, batch_stats, opt_state, metrics, other = map(nnx.to_pure_dict, variables)
    kinds = metric_kinds(nnx, objects)
    fields = [params, batch_stats, opt_state, other]
    positions = [next(iter(x)) if len(x) == 1 else None for x in fields]
    params, batch_stats, opt_state, other = (
        x if position is None else x[position]
        for x, position in zip(fields, positions, strict=True)
    )
    metrics = NnxMetrics(metrics, kinds) if kinds else {}
    return NnxTrainState(params, batch_stats, opt_state, metrics, other), positions


def _to_variables(state: NnxTrainState, positions: list) -> list[PyTree]:
    """Converts a train state to pure dicts by position, for `nnx.merge`."""
    fields = [state.params, state.batch_stats, state.opt_state, state.other]
    by_position = [
        x if position is None else {position: x}
        for x, position in zip(fields, positions, strict=True)
    ]
    metrics = state.metrics
    return [*by_position, metrics.values if isinstance(metrics, NnxMetrics) else {}]


def _by_position(value: PyTree, current: Mapping) -> dict[int, PyTree]:
    """Returns the part of a field that each of the objects has.

    Args:
      value: variables of one object, or a dict by position.
      current: all variables of the objects, by position.
    """
    paths = _paths(value)
    for position, variables in current.items():
        if paths <= _paths(variables):
            return {position: value}
    return {position: value[position] for position in current if position in value}


def _paths(tree: PyTree) -> set[tuple]:
    """Returns the paths of all leaves."""
    return {path for path, _ in jax.tree.leaves_with_path(tree)}


def _partition_specs(nnx: ModuleType, objects: tuple, wrt: Any) -> Callable:
    """Returns the function for the metadata of all variables, by path."""
    _, variables = _variables(nnx, objects, wrt)
    specs, _ = _to_train_state(
        nnx, objects, list(map(nnx.get_partition_spec, variables))
    )
    of_path = dict(jax.tree.leaves_with_path(specs))

    def partition_specs(state: NnxTrainState) -> list:
        return [of_path.get(path) for path, _ in jax.tree.leaves_with_path(state)]

    return partition_specs


def _update_filter(nnx: ModuleType, objects: tuple) -> Any:
    """Returns the filter of the variables that the optimizers update."""
    filters = [x.wrt for x in objects if isinstance(x, nnx.Optimizer)]
    return nnx.Any(*filters) if filters else nnx.Param


def _check_objects(nnx: ModuleType, call: str, objects: tuple) -> None:
    """Raises a TypeError unless there are objects, and each has variables."""
    call = f"{call}(*objects)"
    if not objects:
        raise TypeError(f"{call}: at least one NNX object is needed, got ()")
    for x in objects:
        if isinstance(x, SyncRule):
            raise TypeError(
                f"{call}: a rule is passed as rule={x!r}, got a positional argument"
            )
        has_variables = isinstance(x, nnx.Module) or jax.tree.leaves(nnx.state([x]))
        if isinstance(x, np.ndarray | jax.Array) or not has_variables:
            text = "each of the objects must be an NNX object"
            raise TypeError(f"{call}: {text}, got {describe(x)}")


def _check_step(train_step: Callable, objects: tuple, batch_argnum: int | None) -> None:
    """Raises a TypeError unless the step takes the objects and a batch."""
    check_type("from_nnx(train_step)", "train_step", train_step, Callable)
    if batch_argnum is not None:
        check_int("from_nnx(batch_argnum)", "it", batch_argnum, 0, len(objects))
    try:
        inspect.signature(train_step).bind(*objects, None)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"from_nnx(train_step, *objects): train_step must take {len(objects)} "
            f"objects and a batch, got the error: {error}"
        ) from None


def _check_filter(nnx: ModuleType, wrt: Any) -> None:
    """Raises a TypeError unless the argument is a filter of variables."""
    try:
        nnx.filterlib.to_predicate(wrt)
    except (TypeError, ValueError):
        text = "wrt must be a filter of variables, such as nnx.Param"
        raise TypeError(f"from_nnx(wrt): {text}, got {describe(wrt)}") from None


def _import_nnx(call: str) -> ModuleType:
    """Imports flax.nnx or raises an ImportError with the install command."""
    try:
        from flax import nnx
    except ImportError:
        raise ImportError(f"{call}() needs flax: pip install flax") from None
    return nnx
