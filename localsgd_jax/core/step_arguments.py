"""Training steps of several arguments, such as `step(params, opt_state, x, y)`."""

import inspect
from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from localsgd_jax.core.algorithm import Rules, from_train_step, metrics_of
from localsgd_jax.core.averaging import average
from localsgd_jax.core.static_leaves import mark_static, restore_static
from localsgd_jax.core.types import Algorithm, PyTree
from localsgd_jax.core.validation import check_rules, check_type

_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def from_arguments(
    train_step: Callable, *values: PyTree, rule: Rules = None
) -> tuple[Algorithm, PyTree]:
    """Creates local SGD from a training step of several arguments.

    The first arguments are the train state, a NamedTuple with their names. The others
    are the batch: a single one as it is, several as a tuple.

        model, opt_state, loss = train_step(model, opt_state, x, y)

    Leaves that are no arrays, such as functions, strings and numbers of Python, stay
    as they are. Modules of Equinox may therefore be passed whole.

    Args:
      train_step: function of one worker. It returns the new values among its results;
        the first result with the structure and the shapes of an argument is its new
        value, and all others are metrics.
      *values: initial values of the first arguments. Typed PRNG keys become a
        different key for each worker.
      rule: rule of the first argument, or a dict from argument to rule; None for
        `average()`.

    Returns:
      An algorithm for `simulate` or `on_mesh`, and the train state for its `init`.
      `consensus(state, None)` returns the values in the order of the arguments.

    Raises:
      TypeError: if the step is not callable, or takes no batch after the values; when
        traced, if it does not return each of the values.
      ValueError: if a rule names no argument.

    Example:
      >>> import jax.numpy as jnp
      >>> import localsgd_jax as lsgd
      >>> def train_step(params, count, batch):
      ...     return params - 0.5 * (params - batch), count + 1
      >>> algorithm, start = lsgd.from_arguments(train_step, jnp.zeros(2), jnp.int32(0))
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> state, _ = cluster.step(cluster.init(start), jnp.array([[1.0, 1], [3, 3]]))
      >>> params, count = lsgd.consensus(state, None)
      >>> params, int(count)
      (Array([1., 1.], dtype=float32), 1)
    """
    call = "from_arguments"
    check_type(f"{call}(train_step)", "train_step", train_step, Callable)
    check_rules(f"{call}(rule)", rule)
    names = _argument_names(call, train_step, len(values))
    num_batches = num_batch_arguments(train_step, len(values))
    make_state = namedtuple("TrainArguments", names)
    start = make_state(*map(mark_static, values))
    if not jax.tree.leaves(start[0]):
        raise TypeError(
            f"{call}(*values): the argument {names[0]!r} must have arrays, got "
            f"{values[0]!r}"
        )

    def step(state: Any, batch: PyTree) -> tuple[PyTree, PyTree]:
        batches = (batch,) if num_batches == 1 else batch
        results = train_step(*restore_static(state), *batches)
        results = list(results) if isinstance(results, tuple | list) else [results]
        new_values = [
            _take_value(name, old, results)
            for name, old in zip(names, state, strict=True)
        ]
        return make_state(*new_values), metrics_of(results)

    if not isinstance(rule, Mapping):
        rule = {names[0]: average() if rule is None else rule}
    return from_train_step(step, rule), start


def num_batch_arguments(train_step: Callable, num_values: int) -> int:
    """Returns the number of arguments of a step after its train state.

    Args:
      train_step: function of one worker.
      num_values: number of arguments that are the train state.

    Returns:
      The number of further arguments without default; 1 if the step does not tell.
    """
    try:
        parameters = inspect.signature(train_step).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = [x for x in parameters if x.kind in _POSITIONAL]
    required = [x for x in positional[num_values:] if x.default is x.empty]
    return max(1, len(required))


def _argument_names(call: str, train_step: Callable, num_values: int) -> list[str]:
    """Returns the names of the arguments that are the train state."""
    parameters = inspect.signature(train_step).parameters.values()
    names = [x.name for x in parameters if x.kind in _POSITIONAL]
    if not 0 < num_values < len(names):
        raise TypeError(
            f"{call}(train_step, *values): train_step must take the values and a batch "
            f"after them, got {num_values} values for the arguments {names}"
        )
    return names[:num_values]


def _take_value(name: str, old: PyTree, results: list) -> PyTree:
    """Removes the new value of an argument from the results of a step."""
    for i, result in enumerate(results):
        new = mark_static(result)
        if _form(new) == _form(old):
            del results[i]
            return new
    raise TypeError(
        f"from_arguments(train_step): train_step must return the new value of {name!r}"
        f", with structure and shapes {_form(old)}, got {list(map(_form, results))}"
    )


def _form(tree: PyTree) -> tuple:
    """Returns structure and shapes of a tree."""
    return jax.tree.structure(tree), tuple(map(jnp.shape, jax.tree.leaves(tree)))
