"""Agreement by the mean: the synchronisation of Local SGD."""

import jax
import jax.numpy as jnp

from localsgd_jax import collectives
from localsgd_jax.base import Context, PyTree, RuleState, SyncRule
from localsgd_jax.trees import choose


def average(axis: collectives.Axis = None) -> SyncRule:
    """Replaces every worker's tree by the mean of all.

    With weights wₖ ≥ 0, equal ones if none are given:

        xₖ ← Σⱼ wⱼ xⱼ / Σⱼ wⱼ

    A worker of weight 0 is left out of the mean and adopts it, so it rejoins. If
    nobody has a positive weight nothing changes. Sums are accumulated in float32 at
    least, whatever the dtype of the leaves.

    Args:
      axis: worker axis, or several, to average over; None for all of them. On a
        mesh `("pod", "worker")`, `average("worker")` averages within each pod and
        `average("pod")` across pods that have agreed within: each weighs what its
        workers weigh together.

    Returns:
      A rule without state. It moves one all-reduce of the tree.

    Raises:
      TypeError: at `init`, for a leaf that has no mean (an integer, a key).
      ValueError: at `apply`, where there is no such axis.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> loss = lambda w, target: jnp.sum((w - target) ** 2)
      >>> algorithm = lsgd.local_sgd(loss, optax.sgd(0.5), rule=lsgd.average())
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> state, _ = cluster.step(cluster.init(jnp.zeros(())), jnp.array([1.0, 3.0]))
      >>> state.workers.params, cluster.sync(state).workers.params
      (Array([1., 3.], dtype=float32), Array([2., 2.], dtype=float32))

    References:
      Stich, Local SGD Converges Fast and Communicates Little, 2019, Algorithm 1.
      arXiv:1805.09767
    """

    def init(tree: PyTree) -> RuleState:
        check_has_mean("average()", tree)
        return RuleState()

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        mean, anyone = collectives.mean(tree, context, axis)
        return choose(anyone, mean, tree), state

    names = (axis,) if isinstance(axis, str) else tuple(axis or ())
    return SyncRule(init, apply, mean_over=names)


def check_has_mean(call: str, tree: PyTree) -> None:
    """Refuses leaves that a mean would silently turn into something else."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{call}: every leaf must be floating point or complex, got "
                f"{dtype} at {jax.tree_util.keystr(path) or 'the root'}; leave "
                "its field to keep(), or what has no mean with floats(rule)"
            )
