"""Agreement on batch statistics: the mean and the variance of all that was seen."""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp

from localsgd_jax import collectives
from localsgd_jax.base import Context, PyTree, RuleState, SyncRule
from localsgd_jax.rules.mean import check_has_mean


def batch_statistics(
    axis: collectives.Axis = None, *, mean: str = "mean", variance: str = "var"
) -> SyncRule:
    """Gives every worker the statistics of the union of what all workers saw.

    For sibling leaves named `mean` and `var`, by the law of total variance:

        μ  = Σₖ wₖ μₖ / Σₖ wₖ
        σ² = Σₖ wₖ (σₖ² + (μₖ − μ)²) / Σₖ wₖ
        μₖ, σₖ² ← μ, σ²

    A plain average would forget how far apart the workers' means are; where they are
    equal it gives the same. All other leaves are averaged. Nothing changes if nobody
    has a positive weight.

    Args:
      axis: worker axis, or several, as in `average`.
      mean: what leaves that hold a mean are called; Flax, linen and NNX, says "mean".
      variance: what their siblings that hold the variance are called.

    Returns:
      A rule that remembers the means agreed last. It moves one all-reduce of the tree.

    Raises:
      TypeError: at `init`, for a leaf that has no mean (an integer, a key).
      ValueError: at `init`, if there are leaves but no such pair.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = {"params": lsgd.average(), "batch_stats": lsgd.batch_statistics()}

    References:
      Chan, Golub, LeVeque, Algorithms for Computing the Sample Variance, 1983,
      equation 2.1.
    """

    def init(tree: PyTree) -> RuleState:
        call = f"batch_statistics(mean={mean!r}, variance={variance!r})"
        check_has_mean(call, tree)
        means = _means(tree, mean, variance)
        if jax.tree.leaves(tree) and not means:
            raise ValueError(
                f"{call}: a mean and a variance must stand side by side, got the "
                f"leaves {[jax.tree_util.keystr(p) for p, _ in _leaves(tree)]}"
            )
        return RuleState(agreed=means)

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        # With dₖ = μₖ − c and d = Σ wₖ dₖ, Σ wₖ = 1:
        #   μ = c + d,   σ² = Σ wₖ (σₖ² + dₖ²) − d²,
        # for any c, so one all-reduce is enough. The mean agreed last is near the
        # new one, so that little cancels.
        last = state.agreed
        means = _means(tree, mean, variance)
        away = {parent: _wide(means[parent]) - _wide(last[parent]) for parent in last}
        moments = _replace(
            tree, away, {mean: lambda x, d: d, variance: lambda x, d: _wide(x) + d**2}
        )
        moments, anyone = collectives.mean(moments, context, axis)
        away = _means(moments, mean, variance)
        merged = _replace(
            moments,
            {parent: (last[parent], away[parent]) for parent in last},
            {
                mean: lambda x, pair: _wide(pair[0]) + x,
                variance: lambda x, pair: jnp.maximum(x - pair[1] ** 2, 0),
            },
        )
        choose = partial(_choose, anyone)
        agreed = jax.tree.map(choose, _means(merged, mean, variance), last)
        return jax.tree.map(choose, merged, tree), RuleState(agreed=agreed)

    return SyncRule(init, apply)


def reestimate(
    update: Callable[[PyTree, PyTree], PyTree],
    statistics: PyTree,
    batches: Iterable[PyTree],
    *,
    mean: str = "mean",
    variance: str = "var",
) -> PyTree:
    """Estimates batch statistics anew on data, as for the averaged parameters.

    Statistics merged from workers describe the activations of the workers' models, not
    of their average. With the statistics of N batches, by the law of total variance:

        μ = (1/N) Σᵢ μᵢ,   σ² = (1/N) Σᵢ (σᵢ² + (μᵢ − μ)²)

    A layer that keeps running statistics mixes those of a batch in,
    s ← β s + (1 − β) sᵢ. Started at 0 and at 1 it gives β and sᵢ away, so nothing
    about the layer need be known.

    Args:
      update: `update(statistics, batch) -> statistics`, the model in training mode.
      statistics: where to begin; only its structure and dtypes matter.
      batches: at least one, of equal size, without a worker axis.
      mean: what leaves that hold a mean are called.
      variance: what their siblings that hold the variance are called.

    Returns:
      The statistics.

    Raises:
      ValueError: without batches.

    Example:
      >>> import jax.numpy as jnp
      >>> def update(s, batch):
      ...     return {"mean": 0.9 * s["mean"] + 0.1 * jnp.mean(batch),
      ...             "var": 0.9 * s["var"] + 0.1 * jnp.var(batch)}
      >>> start = {"mean": jnp.zeros(()), "var": jnp.ones(())}
      >>> found = reestimate(update, start, [jnp.array([0.0, 2.0]), jnp.array([6.0])])
      >>> {name: round(float(x), 3) for name, x in found.items()}
      {'mean': 3.5, 'var': 6.75}

    References:
      Izmailov et al., Averaging Weights Leads to Wider Optima and Better
      Generalization, 2018, section 3.2. arXiv:1803.05407
    """

    @jax.jit
    def of_batch(batch: PyTree) -> PyTree:
        zero = update(jax.tree.map(jnp.zeros_like, statistics), batch)
        one = update(jax.tree.map(jnp.ones_like, statistics), batch)
        return jax.tree.map(lambda s, t: _wide(s) / (1 - (_wide(t) - s)), zero, one)

    found = [of_batch(batch) for batch in batches]
    if not found:
        raise ValueError("reestimate(batches): at least one batch is needed, got none")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    centre = jax.tree.map(lambda x: x.mean(0), stacked)
    apart = {parent: x.var(0) for parent, x in _means(stacked, mean, variance).items()}
    merged = _replace(
        centre, apart, {mean: lambda x, v: x, variance: lambda x, v: x + v}
    )
    return jax.tree.map(lambda m, x: m.astype(x.dtype), merged, statistics)


def _leaves(tree: PyTree) -> list[tuple[tuple, jax.Array]]:
    """Lists the leaves with their paths, an NNX Variable being a leaf itself."""
    return [(_bare(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def _bare(path: tuple) -> tuple:
    """Drops the step from an NNX Variable to its value."""
    return path[:-1] if path[-1:] == (jax.tree_util.GetAttrKey("value"),) else path


def _place(path: tuple) -> tuple[str, str]:
    """Returns where a leaf stands and what it is called."""
    bare = _bare(path)
    parent, name = bare[:-1], bare[-1:]
    return jax.tree_util.keystr(parent), jax.tree_util.keystr(name, simple=True)


def _means(tree: PyTree, mean: str, variance: str) -> dict[str, jax.Array]:
    """Returns the means that have a variance beside them, by where they stand."""
    found = {_place(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    return {
        parent: leaf
        for (parent, name), leaf in found.items()
        if name == mean and (parent, variance) in found
    }


def _replace(tree: PyTree, values: dict, by_name: dict[str, Callable]) -> PyTree:
    """Replaces the means and variances of pairs, given a value for each pair."""

    def replace(path: tuple, leaf: jax.Array) -> jax.Array:
        parent, name = _place(path)
        if parent in values and name in by_name:
            return by_name[name](leaf, values[parent])
        return leaf

    return jax.tree.map_with_path(replace, tree)


def _choose(anyone: jax.Array | bool, new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns the new value in the dtype of the old if anyone is there."""
    return jnp.where(anyone, new.astype(old.dtype), old)


def _wide(x: jax.Array) -> jax.Array:
    """Casts to float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
