"""Metrics by name: of training steps and of synchronisation rules."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.core.types import PyTree, RuleMetrics, State
from localsgd_jax.core.validation import check


def metrics_by_name(metrics: PyTree, ndim: int) -> dict[str, jax.Array]:
    """Returns the metrics that have a given number of axes, by name.

    Args:
      metrics: pytree of a training step; leaves stacked over steps, `(H, ...)` or
        `(H, K, ...)`.
      ndim: number of axes of a metric that is one number per step and worker.

    Returns:
      Leaves by their path, joined with dots; a metric without a path is called "loss".
      Leaves with another number of axes are omitted.

    Raises:
      ValueError: if two metrics have one name, or one is complex.

    Example:
      >>> import jax.numpy as jnp
      >>> metrics = {"more": {"accuracy": jnp.ones((2, 4))}, "row": jnp.ones((2, 4, 3))}
      >>> list(metrics_by_name(metrics, 2)), list(metrics_by_name(jnp.ones((2, 4)), 2))
      (['more.accuracy'], ['loss'])
    """
    named = {}
    for path, leaf in jax.tree.leaves_with_path(metrics):
        if leaf.ndim == ndim:
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "loss"
            text = "every name must occur once"
            check(name not in named, "train_step: metrics", text, repr(name))
            is_real = not jnp.issubdtype(leaf.dtype, jnp.complexfloating)
            text = f"{name!r} must be real"
            check(is_real, "train_step: metrics", text, leaf.dtype)
            named[name] = leaf
    return named


def metric_objects(metrics: PyTree) -> tuple[dict[str, Any], PyTree]:
    """Separates metric objects from the other metrics of a training step.

    A metric object, such as a metric or a collection of CLU or metrax, is a pytree with
    the methods `merge`, `reduce` and `compute`.

    Args:
      metrics: pytree of a training step.

    Returns:
      The objects by their path, joined with dots, and the pytree with None for them.
    """
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): node
        for path, node in jax.tree.leaves_with_path(metrics, is_leaf=_is_object)
        if _is_object(node)
    }
    others = jax.tree.map(
        lambda node: None if _is_object(node) else node, metrics, is_leaf=_is_object
    )
    return named, others


def computed_metrics(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Computes the values of metric objects over local steps and workers.

        value = compute(reduce(mₖₜ)),  over all steps t of a round and all workers k

    Args:
      steps: metric objects of each step by name, leaves `(K, ...)`.

    Returns:
      Scalars by name; those of a collection have its name and a dot before theirs.
    """
    values = {}
    for name in steps[0] if steps else ():
        stacked = jax.tree.map(
            lambda *leaves: np.concatenate(leaves), *[step[name] for step in steps]
        )
        computed = _reduce(stacked).compute()
        named = computed if isinstance(computed, Mapping) else {"": computed}
        values |= {_join(name, part): value for part, value in named.items()}
    return {name: float(x) for name, x in values.items() if np.ndim(x) == 0}


@jax.jit
def _reduce(metric: Any) -> Any:
    """Merges a metric object along its leading axis."""
    return metric.reduce()


def _is_object(node: Any) -> bool:
    """Returns whether a node of a pytree is a metric object."""
    methods = ("merge", "reduce", "compute")
    return all(callable(getattr(node, name, None)) for name in methods)


def _join(name: str, part: str) -> str:
    """Joins the name of an object and that of a part; "loss" without either."""
    return ".".join(filter(None, (name, part))) or "loss"


def rule_metrics(state: State) -> dict[str, jax.Array]:
    """Returns the metrics that synchronisation rules report in their shared state.

    Args:
      state: state of a cluster.

    Returns:
      Scalars by name; if several rules use one name, that of the last rule.
    """
    nodes = jax.tree.leaves(state.shared, is_leaf=lambda x: isinstance(x, RuleMetrics))
    reported = [node.scalars for node in nodes if isinstance(node, RuleMetrics)]
    return {name: number for scalars in reported for name, number in scalars.items()}
