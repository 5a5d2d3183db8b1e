"""The algorithm of one worker: local steps and a rule per field."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from optax.tree_utils import tree_cast_like

from localsgd_jax.core import train_state
from localsgd_jax.core.averaging import average
from localsgd_jax.core.call_names import value_name
from localsgd_jax.core.optimizer_arguments import (
    accepted_arguments,
    evaluated_params,
    gradient_function,
)
from localsgd_jax.core.pieces import infer_specs, with_specs
from localsgd_jax.core.prng_keys import forbid_raw_keys
from localsgd_jax.core.pytrees import promote
from localsgd_jax.core.types import (
    Algorithm,
    PerWorker,
    PyTree,
    RuleState,
    Sharded,
    SyncContext,
    SyncRule,
    states_by_name,
)
from localsgd_jax.core.validation import (
    check,
    check_optimizer,
    check_rules,
    check_type,
    describe,
)

Fields = str | tuple[str, ...]
Rules = SyncRule | Mapping[Fields, SyncRule] | Mapping[str, SyncRule] | None


class WorkerState(NamedTuple):
    """Train state of one worker of `local_sgd`.

    Attributes:
      params: parameters xₖ.
      opt_state: state of the inner optimizer.
    """

    params: PyTree
    opt_state: PyTree


class CorrectedWorkerState(NamedTuple):
    """Train state of one worker of `local_sgd` with `control_variates`.

    Attributes:
      params: parameters xₖ.
      opt_state: state of the inner optimizer.
      correction: mₖ, added to gradients, in float32 at least.
    """

    params: PyTree
    opt_state: PyTree
    correction: PyTree


def local_sgd(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    rule: Rules = None,
    *,
    has_aux: bool = False,
) -> Algorithm:
    """Creates local SGD from a loss function and an optax optimizer.

    Each worker k takes steps on its own batches ξ, and a rule synchronises all workers,
    by default the mean:

        xₖ ← xₖ + optimizer(∇f(xₖ; ξ))
        x₁, …, x_K ← rule(x₁, …, x_K)

    Optimizers with extra arguments, such as `optax.lbfgs` and `optax.polyak_sgd`,
    receive `value`, `grad` and `value_fn`, and `optax.contrib.sam` in opaque mode
    `grad_fn`. The parameters may be `optax.LookaheadParams`: the loss is that of the
    fast ones, and both are synchronised. With a rule for the field "correction",
    such as `control_variates`, the train state has this field, and local steps add it
    to gradients.

    Args:
      loss_fn: `loss_fn(params, batch)` returns a scalar, or with `has_aux` a pair of a
        scalar and any pytree.
      optimizer: any optax optimizer; by default its state is not synchronised.
      rule: rule for the parameters, or a dict of rules for "params" and "opt_state"; a
        tuple of fields has one rule for all of them; None for `average()`.
      has_aux: as in `jax.value_and_grad`.

    Returns:
      An algorithm for `simulate` or `on_mesh`. Its metrics are `{"loss": …}`, with
      `has_aux` also `"aux"`.

    Raises:
      TypeError: if an argument has the wrong type; when traced, if the loss is not a
        floating point scalar.
      ValueError: if no field has a rule.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> def loss_fn(params, batch):
      ...     inputs, targets = batch
      ...     return jnp.mean((inputs @ params["w"] - targets) ** 2)
      >>> algorithm = local_sgd(loss_fn, optax.adam(1e-3))

    References:
      Stich, Local SGD Converges Fast and Communicates Little, 2019, Algorithm 1.
      arXiv:1805.09767
    """
    check_type("local_sgd(loss_fn)", "loss_fn", loss_fn, Callable)
    check_optimizer("local_sgd(optimizer)", optimizer)
    check_rules("local_sgd(rule)", rule)
    check_type("local_sgd(has_aux)", "has_aux", has_aux, bool)
    optimizer = optax.with_extra_args_support(optimizer)
    accepted = accepted_arguments(optimizer)
    rules = rules_by_field(rule)
    is_corrected = any("correction" in _names(fields) for fields in rules)

    def scalar_loss(params: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree]:
        result = loss_fn(params, batch)
        if not has_aux:
            return _check_scalar_loss(result), None
        loss, aux = _check_pair(
            "local_sgd(loss_fn, has_aux=True)", "loss_fn", "(loss, aux)", result
        )
        return _check_scalar_loss(loss), aux

    def train_step(worker: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        params, opt_state, *correction = worker
        value_and_grad = jax.value_and_grad(scalar_loss, has_aux=True)
        (loss, aux), grad = value_and_grad(evaluated_params(params), batch)
        if is_corrected:
            grad = tree_cast_like(optax.tree_utils.tree_add(grad, *correction), grad)
        available = {
            "value": loss,
            "grad": grad,
            "value_fn": lambda params: scalar_loss(params, batch)[0],
            "grad_fn": gradient_function(scalar_loss, batch),
        }
        extra = {name: available[name] for name in accepted}
        try:
            updates, opt_state = optimizer.update(grad, opt_state, params, **extra)
        except Exception:
            _check_own("step(state)", "opt_state", opt_state, optimizer.init, params)
            raise
        metrics = {"loss": loss, "aux": aux} if has_aux else {"loss": loss}
        new_params = optax.apply_updates(params, updates)
        return worker._replace(params=new_params, opt_state=opt_state), metrics

    algorithm = from_train_step(train_step, rules)

    def init(params: PyTree, specs: PyTree | None = None) -> tuple[PyTree, RuleState]:
        worker = WorkerState(params, optimizer.init(params))
        if is_corrected:
            zeros = jax.tree.map(jnp.zeros_like, promote(params))
            worker = CorrectedWorkerState(*worker, zeros)
        return algorithm.init(worker, infer_specs(worker, params, specs))

    return algorithm._replace(init=init, optimizer_name=value_name(optimizer))


def from_train_step(train_step: Callable, rule: Rules = None) -> Algorithm:
    """Creates local SGD from an existing training step.

    Each field named in `rule` is synchronised, by default the mean of "params"; all
    other fields stay local:

        sₖ ← train_step(sₖ, ξ)
        sₖ.field ← rule[field](s₁.field, …, s_K.field)

    A tuple of fields as a key has one rule, which receives a dict of their trees.

    Args:
      train_step: `train_step(train_state, batch) -> (train_state, metrics)`, written
        for one worker. It may also return the state only, or a tuple of the state and
        several metrics in any order, of which the first value with the structure of
        the state is the new state. The state is a NamedTuple, a dataclass (Flax's
        `TrainState`) or a dict, and a pytree. A typed key in it (`jax.random.key`)
        becomes a different key for each worker. A raw `jax.random.PRNGKey` would be
        equal on all workers and is refused at `init`, except in the fields "params",
        "batch_stats" and "opt_state".
      rule: a dict from field, or tuple of fields, to rule; a bare rule is the rule of
        its `fields`, "params" by default; None for `average()`.

    Returns:
      An algorithm; its `init` takes a train state.

    Raises:
      TypeError: if an argument has the wrong type; when traced, if the step returns a
        state of another structure, shape or dtype.
      ValueError: if no field has a rule, or a field has several; at `init`, if the
        state lacks a field.

    Example:
      >>> def train_step(state, batch):
      ...     w = state["params"] - 0.1 * (state["params"] - batch)
      ...     return {"params": w, "seen": state["seen"] + 1}, {"w": w}
      >>> algorithm = from_train_step(train_step)
    """
    check_type("from_train_step(train_step)", "train_step", train_step, Callable)
    check_rules("from_train_step(rule)", rule)
    rules = rules_by_field(rule)
    _check_fields(rules)

    def init(worker: PyTree, specs: PyTree | None = None) -> tuple[PyTree, RuleState]:
        forbid_raw_keys("init(train_state)", worker)
        trees, tree_specs = _fields(worker, rules), _fields(specs, rules)
        states = {
            _label(field): _init_rule(
                rules[field], field, trees[field], tree_specs[field]
            )
            for field in rules
        }
        return worker, states_by_name(states)

    def step(worker: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        call = "from_train_step(train_step)"
        new_state, metrics = _split_result(worker, train_step(worker, batch))
        _check_same_structure(call, "state", worker, new_state)
        return new_state, metrics

    def sync(
        worker: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        check_type("sync(state)", "the rule state", state.shared, Mapping)
        labels = sorted(map(_label, rules))
        same_fields = sorted(state.shared) == labels
        text = f"the state must be of rules for the fields {labels}"
        check(same_fields, "sync(state)", text, sorted(state.shared))
        trees, states = {}, {}
        specs = _fields(context.specs, rules)
        for field, tree in _fields(worker, rules).items():
            label = _label(field)
            field_state = RuleState(state.shared[label], state.local[label])
            call = f"rule for the field {field!r}"
            field_context = context._replace(specs=specs[field])
            try:
                result = rules[field].apply(tree, field_state, field_context)
            except Exception:
                name, init = f"rule state of {field!r}", rules[field].init
                _check_own("sync(state)", name, field_state, init, tree)
                raise
            new_tree, new_state = _check_pair(
                call, "apply", "(tree, RuleState)", result
            )
            _check_same_structure(call, "tree", tree, new_tree)
            _check_same_structure(call, "RuleState", field_state, new_state)
            trees |= {field: new_tree} if isinstance(field, str) else new_tree
            states[label] = new_state
        return train_state.replace_fields(worker, trees), states_by_name(states)

    names = {_label(field): rule.name for field, rule in rules.items()}
    return Algorithm(init, step, sync, names)


def _split_result(worker: PyTree, result: PyTree) -> tuple[PyTree, PyTree]:
    """Splits the result of a training step into the new state and the metrics."""
    if _is_state(worker, result):
        return result, {}
    if not isinstance(result, tuple | list) or not result:
        raise TypeError(
            "from_train_step(train_step): train_step must return the train state, or "
            f"a tuple of it and of metrics, got {type(result).__name__} "
            f"{jax.tree.structure(result)}"
        )
    # Without a state of this structure the first value is reported as a changed state.
    index = next((i for i, x in enumerate(result) if _is_state(worker, x)), 0)
    return result[index], metrics_of([*result[:index], *result[index + 1 :]])


def _is_state(worker: PyTree, value: PyTree) -> bool:
    """Returns whether a value has the type and the structure of the train state."""
    has_structure = jax.tree.structure(value) == jax.tree.structure(worker)
    return type(value) is type(worker) and has_structure


def metrics_of(values: list) -> PyTree:
    """Returns the metrics of a step: nothing, a single value, or a tuple of several.

    Args:
      values: results of the step without the train state.

    Returns:
      A pytree.
    """
    if not values:
        return {}
    return values[0] if len(values) == 1 else tuple(values)


def rules_by_field(rule: Rules) -> dict[Fields, SyncRule]:
    """Returns the rule of each field; `average()` for "params" by default."""
    if isinstance(rule, Mapping):
        return cast(dict[Fields, SyncRule], dict(rule))
    rule = average() if rule is None else rule
    return {getattr(rule, "fields", "params"): rule}


def _check_fields(rules: Mapping[Fields, SyncRule]) -> None:
    """Raises a ValueError unless there are fields, each with one rule."""
    if not rules:
        raise ValueError(
            "local_sgd(rule): at least one field must have a rule, got {}; use "
            '{"params": identity()} to synchronise nothing'
        )
    fields = [name for field in rules for name in _names(field)]
    repeated = sorted({name for name in fields if fields.count(name) > 1})
    text = "each field must have one rule"
    check(not repeated, "from_train_step(rule)", text, repeated)


def _names(field: Fields) -> tuple[str, ...]:
    """Returns the fields of a key in a dict of rules."""
    return (field,) if isinstance(field, str) else field


def _label(field: Fields) -> str:
    """Returns the key of the rule state of a field, or of several fields."""
    return ", ".join(_names(field))


def _fields(worker: PyTree | None, rules: Mapping) -> Mapping[Fields, PyTree]:
    """Returns the trees that have rules; None for each without a train state."""
    if worker is None:
        return dict.fromkeys(rules)
    return {
        field: train_state.get_fields(worker, [field])[field]
        if isinstance(field, str)
        else train_state.get_fields(worker, field)
        for field in rules
    }


def _init_rule(
    rule: SyncRule, field: Fields, tree: PyTree, specs: PyTree | None
) -> RuleState:
    """Initialises the rule of a field; errors name the field."""
    call = f"rule for the field {field!r}"
    try:
        state = rule.init(tree, specs)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{call}: {error}") from None
    if not isinstance(state, RuleState):
        raise TypeError(f"{call}: init must return a RuleState, got {state!r}")
    return with_specs(state, tree, specs)


def _check_scalar_loss(loss: jax.Array) -> jax.Array:
    """Raises a TypeError unless the loss is a floating point scalar."""
    if isinstance(loss, tuple):
        raise TypeError(
            "local_sgd(loss_fn): the loss must be a scalar, got a tuple; for "
            "(loss, aux) pass has_aux=True"
        )
    loss = jnp.asarray(loss)
    if loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            "local_sgd(loss_fn): the loss must be a floating point scalar, got "
            f"{loss.dtype} of shape {loss.shape}"
        )
    return loss


def _check_pair(call: str, function: str, form: str, result: tuple) -> tuple:
    """Raises a TypeError unless the result of a function is a pair."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{call}: {function} must return {form}, got {result!r}")
    return result


def _check_own(
    call: str, name: str, state: PyTree, init: Callable, tree: PyTree
) -> None:
    """Raises a TypeError if a state is not of the structure that `init` makes.

    Called after an error, because a state of another optimizer or rule fails anywhere.
    """
    try:
        own = jax.eval_shape(lambda: init(tree))
    except Exception:
        return
    expected, actual = map(jax.tree.structure, (_without_rows(own), state))
    if expected != actual:
        raise TypeError(
            f"{call}: the {name} must be of this algorithm, not of another optimizer "
            f"or rule, got {describe(actual)} instead of {describe(expected)}"
        )


def _without_rows(tree: PyTree) -> PyTree:
    """Returns the trees inside `PerWorker` and `Sharded`."""
    wrappers = (PerWorker, Sharded)

    def unwrap(node: PyTree) -> PyTree:
        return _without_rows(node.tree) if isinstance(node, wrappers) else node

    return jax.tree.map(unwrap, tree, is_leaf=lambda x: isinstance(x, wrappers))


def _check_same_structure(call: str, name: str, old: PyTree, new: PyTree) -> None:
    """Raises a TypeError if structure, a shape or a dtype has changed."""
    old_leaves, new_leaves = map(dict, map(jax.tree.leaves_with_path, (old, new)))
    old_structure, new_structure = map(jax.tree.structure, (old, new))
    if old_structure != new_structure:
        difference = old_leaves.keys() ^ new_leaves.keys()
        paths = sorted(map(jax.tree_util.keystr, difference))
        where = f", which differ at {paths}" if paths else ""
        raise TypeError(
            f"{call}: the {name} must keep its structure, got {new_structure} from "
            f"{old_structure}{where}"
        )
    for path, leaf in old_leaves.items():
        before, after = map(_shape_and_dtype, (leaf, new_leaves[path]))
        if before != after:
            raise TypeError(
                f"{call}: the {name} must keep its shapes and dtypes, got {after} from "
                f"{before} at {jax.tree_util.keystr(path) or 'the root'}"
            )


def _shape_and_dtype(leaf: jax.Array) -> str:
    """Formats dtype and shape of a leaf, such as "float32[2, 3]"."""
    return f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(jnp.shape(leaf))}"
