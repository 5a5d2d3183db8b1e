"""Local SGD for one worker: a training step, and a rule for what workers share."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from localsgd_jax import fields
from localsgd_jax.base import Algorithm, Context, PyTree, RuleState, SyncRule
from localsgd_jax.rules.combine import check_rule


class Worker(NamedTuple):
    """One worker's training state in `local_sgd`.

    Attributes:
      params: xₖ.
      opt_state: the inner optimizer's state.
    """

    params: PyTree
    opt_state: PyTree


def local_sgd(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    rule: SyncRule | Mapping[str, SyncRule],
    *,
    has_aux: bool = False,
) -> Algorithm:
    """Local SGD: optimizer steps on each worker's own copy, a rule to agree.

    Worker k at step t, with its own batch ξ, and at a synchronisation:

        xₖ ← xₖ + optimizer(∇f(xₖ; ξ))
        x₁, …, x_K ← rule(x₁, …, x_K)

    Optimizers that ask for more than the gradient get `value`, `grad` and `value_fn`,
    as `optax.lbfgs` and `optax.polyak_sgd` want them.

    Args:
      loss_fn: `loss_fn(params, batch)` gives a scalar, or with `has_aux` a pair of a
        scalar and anything.
      optimizer: any optax optimizer; its state stays with the worker.
      rule: for the parameters, or a dict of rules for "params" and "opt_state".
      has_aux: as in `jax.value_and_grad`.

    Returns:
      An algorithm for `simulate` or `on_mesh`. Its metrics are `{"loss": …}`, with
      `has_aux` also `"aux"`.

    Raises:
      TypeError: if an argument is not what it must be, or, when traced, the loss not
        a floating point scalar.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> def loss_fn(params, batch):
      ...     inputs, targets = batch
      ...     return jnp.mean((inputs @ params["w"] - targets) ** 2)
      >>> algorithm = local_sgd(loss_fn, optax.adam(1e-3), rule=lsgd.average())

    References:
      Stich, Local SGD Converges Fast and Communicates Little, 2019, Algorithm 1.
      arXiv:1805.09767
    """
    if not callable(loss_fn):
        raise TypeError(
            f"local_sgd(loss_fn): loss_fn must be callable, got {loss_fn!r}"
        )
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "local_sgd(optimizer): an optax optimizer is needed, such as "
            f"optax.sgd(0.1); got {optimizer!r}"
        )
    optimizer = optax.with_extra_args_support(optimizer)

    def scalar_loss(params: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree]:
        result = loss_fn(params, batch)
        if not has_aux:
            return _scalar(result), None
        loss, aux = _pair("local_sgd(loss_fn, has_aux=True)", "(loss, aux)", result)
        return _scalar(loss), aux

    def train_step(worker: Worker, batch: PyTree) -> tuple[Worker, PyTree]:
        params, opt_state = worker
        (loss, aux), grad = jax.value_and_grad(scalar_loss, has_aux=True)(params, batch)
        updates, opt_state = optimizer.update(
            grad,
            opt_state,
            params,
            value=loss,
            grad=grad,
            value_fn=lambda params: scalar_loss(params, batch)[0],
        )
        metrics = {"loss": loss, "aux": aux} if has_aux else {"loss": loss}
        return Worker(optax.apply_updates(params, updates), opt_state), metrics

    algorithm = from_train_step(train_step, rule)

    def init(params: PyTree) -> tuple[Worker, RuleState]:
        return algorithm.init(Worker(params, optimizer.init(params)))

    return algorithm._replace(init=init)


def from_train_step(
    train_step: Callable, rule: SyncRule | Mapping[str, SyncRule]
) -> Algorithm:
    """Turns an existing training step into Local SGD.

    With the fields named by the rules, all others staying the worker's own:

        sₖ ← train_step(sₖ, ξ)
        sₖ.field ← rule[field](s₁.field, …, s_K.field)

    Args:
      train_step: `train_step(train_state, batch) -> (train_state, metrics)`, written
        for one worker. The state is a NamedTuple, a dataclass (Flax's `TrainState`)
        or a dict, and a pytree. A typed key in it (`jax.random.key`) becomes another
        key for each worker; a raw `jax.random.PRNGKey` is but numbers, and the same
        for all.
      rule: a dict from field to rule; a bare rule means "params".

    Returns:
      An algorithm whose `init` takes a train state.

    Raises:
      TypeError: if an argument is not what it must be; when traced, if the step
        returns a state of another structure, shape or dtype.
      ValueError: at `init`, if the state lacks a field.

    Example:
      >>> import localsgd_jax as lsgd
      >>> def train_step(state, batch):
      ...     w = state["params"] - 0.1 * (state["params"] - batch)
      ...     return {"params": w, "seen": state["seen"] + 1}, {"w": w}
      >>> algorithm = from_train_step(train_step, rule=lsgd.average())
    """
    if not callable(train_step):
        raise TypeError(
            f"from_train_step(train_step): it must be callable, got {train_step!r}"
        )
    rules = dict(rule) if isinstance(rule, Mapping) else {"params": rule}
    for field, part in rules.items():
        check_rule(f"rule for the field {field!r}", part)

    def init(worker: PyTree) -> tuple[PyTree, RuleState]:
        shared = fields.read(worker, rules)
        states = {
            field: _init_rule(rules[field], field, shared[field]) for field in rules
        }
        return worker, _by_part(states)

    def step(worker: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        call = "from_train_step(train_step)"
        result = train_step(worker, batch)
        after, metrics = _pair(call, "(train_state, metrics)", result)
        _check_same(call, "state", worker, after)
        return after, metrics

    def sync(
        worker: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        trees, states = {}, {}
        for field, tree in fields.read(worker, rules).items():
            part = RuleState(state.agreed[field], state.own[field])
            result = rules[field].apply(tree, part, context)
            call = f"rule for the field {field!r}"
            trees[field], states[field] = _pair(call, "(tree, RuleState)", result)
            _check_same(call, "tree", tree, trees[field])
            _check_same(call, "RuleState", part, states[field])
        return fields.write(worker, trees), _by_part(states)

    return Algorithm(init, step, sync)


def _by_part(states: Mapping[str, RuleState]) -> RuleState:
    """Turns a dict of rule states into a rule state of dicts."""
    return RuleState(
        {field: state.agreed for field, state in states.items()},
        {field: state.own for field, state in states.items()},
    )


def _init_rule(rule: SyncRule, field: str, tree: PyTree) -> RuleState:
    """Initialises a rule, and names the field if the rule refuses it."""
    call = f"rule for the field {field!r}"
    try:
        state = rule.init(tree)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{call}: {error}") from None
    if not isinstance(state, RuleState):
        raise TypeError(f"{call}: init must return a RuleState, got {state!r}")
    return state


def _scalar(loss: jax.Array) -> jax.Array:
    """Returns the loss if it is a floating point scalar."""
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


def _pair(call: str, form: str, result: tuple) -> tuple:
    """Refuses a function that returns anything but a pair."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{call}: it must return {form}, got {result!r}")
    return result


def _check_same(call: str, what: str, before: PyTree, after: PyTree) -> None:
    """Refuses a change of structure, of a shape or of a dtype."""
    old, new = map(dict, map(jax.tree.leaves_with_path, (before, after)))
    if (was := jax.tree.structure(before)) != (now := jax.tree.structure(after)):
        paths = sorted(map(jax.tree_util.keystr, old.keys() ^ new.keys()))
        where = f", which differ at {paths}" if paths else ""
        raise TypeError(
            f"{call}: the {what} must keep its structure, got {now} from {was}{where}"
        )
    for path, leaf in old.items():
        kept, got = map(_shape_and_dtype, (leaf, new[path]))
        if kept != got:
            raise TypeError(
                f"{call}: the {what} must keep its shapes and dtypes, got {got} from "
                f"{kept} at {jax.tree_util.keystr(path) or 'the root'}"
            )


def _shape_and_dtype(leaf: jax.Array) -> str:
    """Describes a leaf."""
    return f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(jnp.shape(leaf))}"
