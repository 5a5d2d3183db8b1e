"""Metrics by name: of training steps and of synchronisation rules."""

import jax

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
      ValueError: if two metrics have one name.

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
            named[name] = leaf
    return named


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
