"""Weighted averaging over workers."""

import jax
import jax.numpy as jnp

from localsgd_jax.core import collectives
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pytrees import where
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check_names


def average(axis: collectives.Axis = None) -> SyncRule:
    """Replaces the tree of every worker by the weighted mean over workers.

    With weights wₖ ≥ 0, all equal if none are given:

        xₖ ← Σⱼ wⱼ xⱼ / Σⱼ wⱼ

    A worker of weight 0 does not contribute to the mean but receives it. If all weights
    are 0, nothing changes. Sums are accumulated in float32 or wider, whatever the dtype
    of the leaves.

    Args:
      axis: worker axis, or several, to average over; None for all of them. On a
        mesh `("pod", "worker")`, `average("worker")` averages within each pod.
        `average("pod")` averages across pods whose workers are equal; each pod has the
        total weight of its workers.

    Returns:
      A rule without state. It sends one all-reduce of the tree; small leaves are
      concatenated first, each device its own pieces of leaves of one dtype and
      partition.

    Raises:
      TypeError: if the axis is no name; at `init`, for a leaf that is not floating
        point or complex.
      ValueError: at `apply`, if there is no such axis.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> loss = lambda w, target: jnp.sum((w - target) ** 2)
      >>> algorithm = lsgd.local_sgd(loss, optax.sgd(0.5))
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> state, _ = cluster.step(cluster.init(jnp.zeros(())), jnp.array([1.0, 3.0]))
      >>> state.workers.params, cluster.sync(state).workers.params
      (Array([1., 3.], dtype=float32), Array([2., 2.], dtype=float32))

    References:
      Stich, Local SGD Converges Fast and Communicates Little, 2019, Algorithm 1.
      arXiv:1805.09767
    """

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        check_inexact("average()", tree)
        return RuleState()

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        mean, any_active = collectives.mean(tree, context, axis)
        return where(any_active, mean, tree), state

    axes = () if axis is None else check_names("average(axis)", "axis", axis)
    name = call_name("average", axis=axis)
    return SyncRule(init, apply, mean_axes=axes, name=name)


def check_inexact(call: str, tree: PyTree) -> None:
    """Raises a TypeError unless all leaves are floating point or complex."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{call}: every leaf must be floating point or complex, got "
                f"{dtype} at {jax.tree_util.keystr(path) or 'the root'}; use "
                "identity() for its field, or floating_only(rule) to skip such leaves"
            )


def check_floating(call: str, tree: PyTree) -> None:
    """Raises a TypeError unless all leaves are floating point, not complex."""
    check_inexact(call, tree)
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"{call}: every leaf must be floating point, got "
                f"{jnp.result_type(leaf)} at "
                f"{jax.tree_util.keystr(path) or 'the root'}; give its real and "
                "imaginary part leaves of their own"
            )
