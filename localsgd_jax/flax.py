"""Training loops of Flax: a linen TrainState, or an NNX model and its optimizer."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localsgd_jax import fields
from localsgd_jax.algorithm import from_train_step
from localsgd_jax.base import Algorithm, PyTree, SyncRule
from localsgd_jax.rules.statistics import batch_statistics

Rules = SyncRule | Mapping[str, SyncRule]


class Parts(NamedTuple):
    """An NNX model and its optimizer as pure dicts: one worker's train state.

    Attributes:
      params: what the optimizer trains.
      batch_stats: running statistics.
      opt_state: the state of the optimizer, its count of steps included.
      rest: all other variables, such as keys and counts of random streams.
    """

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    rest: PyTree


def from_linen(
    train_step: Callable, train_state: PyTree, rule: Rules
) -> tuple[Algorithm, PyTree]:
    """Makes Local SGD of a linen training step.

    What becomes of a field, unless the rules say something else:

    - `params`: the rule.
    - `batch_stats`, if there is one: merged by `batch_statistics()`.
    - all others, such as `opt_state` and `step`: a worker's own.
    - typed keys, also within fields: another one for each worker. Folded with `step`
      they give masks that no two workers and no two steps share.

    Args:
      train_step: `train_step(train_state, batch) -> (train_state, metrics)`, written
        for one worker; metrics may be a scalar loss or a dict.
      train_state: a `TrainState` of Flax or a subclass of it.
      rule: for `params`, or a dict from field to rule.

    Returns:
      An algorithm for `simulate` or `on_mesh`, and the train state that its `init`
      takes. `consensus(state, None)` gives such a train state back.

    Raises:
      TypeError: if there is a raw key, which would be the same for all workers.
      ValueError: if a rule names a field that is not there.

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
      >>> algorithm, start = from_linen(train_step, start, lsgd.average())
      >>> cluster = lsgd.simulate(algorithm, workers=4)
      >>> state, loss = cluster.step(cluster.init(start), jnp.ones((4, 2, 3)))
      >>> lsgd.consensus(cluster.sync(state), None).params["kernel"].shape
      (3, 1)
    """
    rules = _with_defaults(train_state, rule)
    for path, leaf in jax.tree.leaves_with_path(train_state):
        field = jax.tree_util.keystr(path[:1], simple=True)
        if field not in ("params", "batch_stats", "opt_state") and _is_raw_key(leaf):
            raise TypeError(
                f"from_linen(train_state): the field {field!r} holds a raw key at "
                f"{jax.tree_util.keystr(path)}, which would be the same for all "
                "workers; make it with jax.random.key, or jax.random.wrap_key_data"
            )
    return from_train_step(train_step, rules), train_state


def from_nnx(
    train_step: Callable, model: Any, optimizer: Any, rule: Rules
) -> tuple[Algorithm, Parts]:
    """Makes Local SGD of an NNX training step.

    The fields are those of `Parts`. What becomes of them, unless the rules say
    something else:

    - `params`, the variables that `optimizer.wrt` selects: the rule.
    - `batch_stats`, if there are any: merged by `batch_statistics()`.
    - `opt_state` and `rest`: a worker's own.
    - keys of random streams, which are in `rest`: another one for each worker; a
      stream folds its count in at each use.

    Args:
      train_step: `train_step(model, optimizer, batch) -> metrics`, written for one
        worker; it updates the model and the optimizer in place.
      model: an `nnx.Module` in training mode.
      optimizer: an `nnx.Optimizer` of it.
      rule: for `params`, or a dict from field to rule.

    Returns:
      An algorithm for `simulate` or `on_mesh`, and what its `init` takes: the model
      and the optimizer as they are now. `into_nnx` is the way back.

    Raises:
      ImportError: without flax.
      ValueError: if a rule names a field that is not there.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> from flax import nnx
      >>> from localsgd_jax.flax import from_nnx, into_nnx
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> def train_step(model, optimizer, batch):
      ...     loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(batch) ** 2))(model)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> algorithm, start = from_nnx(train_step, model, optimizer, lsgd.average())
      >>> cluster = lsgd.simulate(algorithm, workers=4)
      >>> state, loss = cluster.step(cluster.init(start), jnp.ones((4, 2, 3)))
      >>> into_nnx(lsgd.consensus(cluster.sync(state), None), model, optimizer)
    """
    nnx = _nnx("from_nnx")
    model_graph, start = _split(nnx, model, optimizer)
    optimizer_graph = nnx.graphdef(optimizer)

    def pure_step(parts: Parts, batch: PyTree) -> tuple[Parts, PyTree]:
        merged = nnx.merge(model_graph, parts.params, parts.batch_stats, parts.rest)
        trained_by = nnx.merge(optimizer_graph, parts.opt_state)
        metrics = train_step(merged, trained_by, batch)
        return _split(nnx, merged, trained_by)[1], metrics

    return from_train_step(pure_step, _with_defaults(start, rule)), start


def into_nnx(parts: Parts, model: Any, optimizer: Any = None) -> None:
    """Writes a train state without worker axis into an NNX model, in place.

    Args:
      parts: such as `consensus(state, None)`.
      model: the one given to `from_nnx`, or one like it.
      optimizer: its optimizer, or None to leave that alone.

    Raises:
      ImportError: without flax.

    Example:
      >>> import optax
      >>> import localsgd_jax as lsgd
      >>> from flax import nnx
      >>> from localsgd_jax.flax import from_nnx, into_nnx
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> step = lambda model, optimizer, batch: 0.0
      >>> _, start = from_nnx(step, model, optimizer, lsgd.average())
      >>> into_nnx(start, model, optimizer)
    """
    nnx = _nnx("into_nnx")
    for part in (parts.params, parts.batch_stats, parts.rest):
        nnx.update(model, part)
    if optimizer is not None:
        nnx.update(optimizer, parts.opt_state)


def _split(nnx: ModuleType, model: Any, optimizer: Any) -> tuple[Any, Parts]:
    """Returns the graph of a model and its variables, with those of its optimizer."""
    graph, *variables = nnx.split(model, optimizer.wrt, nnx.BatchStat, ...)
    variables.insert(2, nnx.state(optimizer))
    return graph, Parts(*map(nnx.to_pure_dict, variables))


def _with_defaults(train_state: PyTree, rule: Rules) -> dict[str, SyncRule]:
    """Adds the rule for batch statistics where there are any and none is given."""
    rules = dict(rule) if isinstance(rule, Mapping) else {"params": rule}
    has = "batch_stats" in fields.of(train_state)
    if has and jax.tree.leaves(fields.read(train_state, ["batch_stats"])):
        rules.setdefault("batch_stats", batch_statistics())
    return rules


def _is_raw_key(leaf: Any) -> bool:
    """Returns whether a leaf looks like one that `jax.random.PRNGKey` made."""
    return jnp.shape(leaf) == (2,) and jnp.result_type(leaf) == jnp.uint32


def _nnx(call: str) -> ModuleType:
    """Imports what the rest of the library does without."""
    try:
        from flax import nnx
    except ImportError:
        raise ImportError(f"{call}() needs flax: pip install flax") from None
    return nnx
