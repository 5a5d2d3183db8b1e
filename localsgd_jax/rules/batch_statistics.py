"""Batch statistics: merging over workers and recomputation for averaged parameters."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from optax.tree_utils import tree_cast_like

from localsgd_jax.core import collectives
from localsgd_jax.core.averaging import check_floating
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pytrees import promote, stack_leaves, where
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check, check_names, check_type


def merge_batch_stats(
    axis: collectives.Axis = None, *, mean: str = "mean", variance: str = "var"
) -> SyncRule:
    """Merges batch-norm means and variances over workers.

    For sibling leaves named `mean` and `var`, by the law of total variance:

        μ  = Σₖ wₖ μₖ / Σₖ wₖ
        σ² = Σₖ wₖ (σₖ² + (μₖ − μ)²) / Σₖ wₖ
        μₖ, σₖ² ← μ, σ²

    These are the statistics of the union of the workers' data. A plain average of the
    variances omits the variance between the workers' means; if the means are equal, the
    results are equal. All other leaves are averaged. If all weights are 0, nothing
    changes.

    Args:
      axis: worker axis, or several, as in `average`.
      mean: name of the leaves that hold a mean; "mean" in Flax Linen and NNX.
      variance: name of their siblings that hold the variance.

    Returns:
      A rule whose shared state holds the last merged means. It sends one all-reduce of
      the tree.

    Raises:
      TypeError: if a name is no string; at `init`, for a leaf that is not floating
        point.
      ValueError: at `init`, if the tree has leaves but no such pair.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = {"params": lsgd.average(), "batch_stats": lsgd.merge_batch_stats()}

    References:
      Chan, Golub, LeVeque, Algorithms for Computing the Sample Variance, 1983,
      equation 2.1.
    """

    function = "merge_batch_stats"
    if axis is not None:
        check_names(f"{function}(axis)", "axis", axis)
    check_type(f"{function}(mean)", "mean", mean, str)
    check_type(f"{function}(variance)", "variance", variance, str)

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        call = f"merge_batch_stats(mean={mean!r}, variance={variance!r})"
        check_floating(call, tree)
        means = _paired_means(tree, mean, variance)
        paths = [_strip_nnx_value(path) for path, _ in jax.tree.leaves_with_path(tree)]
        text = "a mean and a variance must be siblings in the tree"
        leaves = f"the leaves {[jax.tree_util.keystr(path) for path in paths]}"
        check(means or not paths, call, text, leaves)
        return RuleState(shared=means)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        # With dₖ = μₖ − c and d = Σ wₖ dₖ, Σ wₖ = 1:
        #   μ = c + d,   σ² = Σ wₖ (σₖ² + dₖ²) − d²,
        # for any c, so one all-reduce suffices. c is the last merged mean: it is close
        # to the new one, so there is little cancellation.
        last = state.shared
        means = _paired_means(tree, mean, variance)
        shifted = {
            parent: promote(means[parent]) - promote(last[parent]) for parent in last
        }
        moments = _replace(
            tree,
            shifted,
            {mean: lambda x, d: d, variance: lambda x, d: promote(x) + d**2},
        )
        moments, any_active = collectives.mean(moments, context, axis)
        shifted = _paired_means(moments, mean, variance)
        merged = _replace(
            moments,
            {parent: (last[parent], shifted[parent]) for parent in last},
            {
                mean: lambda x, pair: promote(pair[0]) + x,
                variance: lambda x, pair: jnp.maximum(x - pair[1] ** 2, 0),
            },
        )
        means = tree_cast_like(_paired_means(merged, mean, variance), last)
        merged = tree_cast_like(merged, tree)
        new_state = RuleState(shared=where(any_active, means, last))
        return where(any_active, merged, tree), new_state

    name = call_name("merge_batch_stats", axis=axis, mean=mean, variance=variance)
    return SyncRule(init, apply, name=name)


def recompute_batch_stats(
    update: Callable[[PyTree, PyTree], PyTree],
    statistics: PyTree,
    batches: Iterable[PyTree],
    *,
    mean: str = "mean",
    variance: str = "var",
) -> PyTree:
    """Recomputes batch statistics on data, as needed for averaged parameters.

    Merged statistics describe the activations of the workers' models, not of their
    average. With the statistics of N batches, by the law of total variance:

        μ = (1/N) Σᵢ μᵢ,   σ² = (1/N) Σᵢ (σᵢ² + (μᵢ − μ)²)

    A layer with running statistics updates them with batch statistics sᵢ,
    s ← β s + (1 − β) sᵢ. Evaluating it at s = 0 and at s = 1 determines β and sᵢ, so no
    property of the layer has to be given.

    Args:
      update: `update(statistics, batch) -> statistics`, the model in training mode.
      statistics: initial statistics; only structure and dtypes are used.
      batches: at least one, of equal size, without a worker axis.
      mean: name of the leaves that hold a mean.
      variance: name of their siblings that hold the variance.

    Returns:
      The statistics, with the structure and dtypes of `statistics`.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: without batches, or if `update` ignores the batch for a leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> def update(s, batch):
      ...     return {"mean": 0.9 * s["mean"] + 0.1 * jnp.mean(batch),
      ...             "var": 0.9 * s["var"] + 0.1 * jnp.var(batch)}
      >>> initial = {"mean": jnp.zeros(()), "var": jnp.ones(())}
      >>> batches = [jnp.array([0.0, 2.0]), jnp.array([6.0])]
      >>> new = recompute_batch_stats(update, initial, batches)
      >>> {name: round(float(x), 3) for name, x in new.items()}
      {'mean': 3.5, 'var': 6.75}

    References:
      Izmailov et al., Averaging Weights Leads to Wider Optima and Better
      Generalization, 2018, section 3.2. arXiv:1803.05407
    """
    call = "recompute_batch_stats"
    check_type(f"{call}(update)", "update", update, Callable)
    check_type(f"{call}(batches)", "batches", batches, Iterable)
    check_type(f"{call}(mean)", "mean", mean, str)
    check_type(f"{call}(variance)", "variance", variance, str)

    @jax.jit
    def batch_moments(batch: PyTree) -> tuple[PyTree, PyTree]:
        zero = update(jax.tree.map(jnp.zeros_like, statistics), batch)
        one = update(jax.tree.map(jnp.ones_like, statistics), batch)
        shares = jax.tree.map(lambda s, t: 1 - (promote(t) - s), zero, one)
        moments = jax.tree.map(lambda s, share: promote(s) / share, zero, shares)
        return shares, moments

    per_batch = []
    for batch in batches:
        shares, moments = batch_moments(batch)
        _check_shares(shares)
        per_batch.append(moments)
    if not per_batch:
        raise ValueError(
            "recompute_batch_stats(batches): at least one batch is required, got none"
        )
    stacked = stack_leaves(*per_batch)
    averaged = jax.tree.map(lambda x: x.mean(0), stacked)
    variance_of_means = {
        parent: x.var(0) for parent, x in _paired_means(stacked, mean, variance).items()
    }
    merged = _replace(
        averaged,
        variance_of_means,
        {mean: lambda x, v: x, variance: lambda x, v: x + v},
    )
    return tree_cast_like(merged, statistics)


def _check_shares(shares: PyTree) -> None:
    """Raises a ValueError if a batch has no share 1 − β in updated statistics."""
    for path, share in jax.tree.leaves_with_path(shares):
        ignored = not np.all(np.asarray(share))
        name = jax.tree_util.keystr(path) or "the root"
        text = f"the statistics at {name} must depend on the batch"
        call = "recompute_batch_stats(update)"
        check(not ignored, call, text, "a share of 0 of the batch in the update")


def _strip_nnx_value(path: tuple) -> tuple:
    """Removes the `.value` key that NNX appends to the path of a Variable."""
    return path[:-1] if path[-1:] == (jax.tree_util.GetAttrKey("value"),) else path


def _parent_and_name(path: tuple) -> tuple[str, str]:
    """Splits the path of a leaf into the path of its parent and its name."""
    path = _strip_nnx_value(path)
    parent, name = path[:-1], path[-1:]
    return jax.tree_util.keystr(parent), jax.tree_util.keystr(name, simple=True)


def _paired_means(tree: PyTree, mean: str, variance: str) -> dict[str, jax.Array]:
    """Returns the means that have a variance as sibling, by the path of the parent."""
    leaves = {
        _parent_and_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }
    return {
        parent: leaf
        for (parent, name), leaf in leaves.items()
        if name == mean and (parent, variance) in leaves
    }


def _replace(tree: PyTree, values: dict, functions: dict[str, Callable]) -> PyTree:
    """Replaces the leaves of (mean, variance) pairs.

    Args:
      tree: the statistics.
      values: one value per pair, by the path of the parent.
      functions: `function(leaf, value) -> leaf`, by the name of the leaf.

    Returns:
      The tree, with other leaves unchanged.
    """

    def replace(path: tuple, leaf: jax.Array) -> jax.Array:
        parent, name = _parent_and_name(path)
        if parent in values and name in functions:
            return functions[name](leaf, values[parent])
        return leaf

    return jax.tree.map_with_path(replace, tree)
