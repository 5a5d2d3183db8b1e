"""Check that a rule makes all workers equal, by tracing it."""

import jax
import jax.numpy as jnp

from localsgd_jax.core import collectives
from localsgd_jax.core.types import (
    PyTree,
    RuleState,
    SyncContext,
    SyncRule,
    VmapAxis,
)


def check_common_result(
    call: str, rule: SyncRule, tree: PyTree, state: RuleState, context: SyncContext
) -> None:
    """Raises a ValueError unless all workers are equal after each round of a rule.

    The rule is traced, without weights and for any round number, under `jax.vmap` over
    workers, which knows the values that do not depend on a worker. Nothing is run. A
    rule after which workers are equal only in some rounds raises. Workers that are
    equal before the rule along inner worker axes, as after a mean within each pod, are
    traced as equal.

    Args:
      call: public call and argument, such as "ema(rule)".
      rule: its argument.
      tree: tree of this worker.
      state: state of `rule` for this worker.
      context: context of the calling rule.

    Raises:
      ValueError: if the result depends on the worker.
    """
    num_differing = collectives.num_differing_axes(tree, context)
    if num_differing is None:
        return
    axes = {name: VmapAxis(f"{name} of check") for name in context.axes}
    sizes = {name: collectives.size(context, name) for name in context.axes}
    carriers = {name: (axis,) for name, axis in axes.items()}

    def result(tree: PyTree, local: PyTree, shared: PyTree, number: jax.Array):
        inner = SyncContext(carriers, number, None, context.specs)
        return rule.apply(tree, RuleState(shared, local), inner)[0]

    mapped = result
    for i, name in reversed(list(enumerate(axes))):
        row = 0 if i < num_differing else None
        mapped = jax.vmap(
            mapped,
            in_axes=(row, row, None, None),
            out_axes=None,
            axis_name=axes[name],
            axis_size=sizes[name],
        )
    counts = tuple(sizes.values())[:num_differing]
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*counts, *jnp.shape(x)), x.dtype),
        (tree, state.local),
    )
    try:
        jax.eval_shape(mapped, *rows, state.shared, jnp.int32(1))
    except ValueError as error:
        if "out_axes" not in str(error):
            raise
        raise ValueError(
            f"{call}: the rule must make all workers equal in every round, as "
            f"average() does, got {rule!r}"
        ) from None
