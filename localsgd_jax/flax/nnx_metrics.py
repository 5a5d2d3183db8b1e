"""Variables of NNX metrics, and their union over workers."""

import dataclasses
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from localsgd_jax.core.types import PyTree

Path = tuple[Any, ...]


@partial(
    jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["kinds"]
)
@dataclasses.dataclass(frozen=True)
class NnxMetrics:
    """Variables of the `nnx.Metric` objects of a train state.

    Attributes:
      values: pure dict of the variables, by position of the object.
      kinds: path and kind of each metric: "average", "welford" or a class name.
    """

    values: PyTree
    kinds: tuple[tuple[Path, str], ...]

    def merge_workers(self) -> "NnxMetrics":
        """Merges the metrics of all workers.

            total = Σₖ totalₖ,  n = Σₖ nₖ,  mean = Σₖ nₖ meanₖ / n,
            M₂ = Σₖ (M₂ₖ + nₖ (meanₖ − mean)²)

        Returns:
          Metrics without worker axis.

        Raises:
          TypeError: for a metric that is neither `nnx.metrics.Average` nor
            `nnx.metrics.Welford`.
        """
        values = self.values
        for path, kind in self.kinds:
            if kind not in _MERGE:
                raise TypeError(
                    "consensus(state): metrics of several workers can be merged for "
                    f"nnx.metrics.Average and Welford, got {kind}"
                )
            values = _replace(values, path, _MERGE[kind])
        return dataclasses.replace(self, values=values)


def metric_kinds(nnx: ModuleType, objects: tuple) -> tuple[tuple[Path, str], ...]:
    """Returns path and kind of each metric in the graph of NNX objects.

    Args:
      nnx: the module `flax.nnx`.
      objects: any NNX objects.

    Returns:
      Pairs in the order of the graph. The members of a `nnx.MultiMetric` count, and not
      the `nnx.MultiMetric` itself.
    """
    return tuple(
        (path, _kind(nnx, node))
        for path, node in nnx.iter_graph(objects)
        if isinstance(node, nnx.Metric) and not isinstance(node, nnx.MultiMetric)
    )


def _kind(nnx: ModuleType, metric: Any) -> str:
    """Returns the kind of a metric, which decides how workers are merged."""
    if isinstance(metric, nnx.metrics.Average):
        return "average"
    if isinstance(metric, nnx.metrics.Welford):
        return "welford"
    return type(metric).__name__


def _merge_averages(average: dict) -> dict:
    """Adds the totals and the counts of all workers."""
    return {name: jnp.sum(x, axis=0, dtype=x.dtype) for name, x in average.items()}


def _merge_moments(moments: dict) -> dict:
    """Merges counts, means and sums of squared differences of all workers."""
    count, mean, m2 = (moments[name] for name in ("count", "mean", "m2"))
    total = jnp.sum(count, axis=0, dtype=count.dtype)
    joint = jnp.sum(count * mean, axis=0) / jnp.maximum(total, 1)
    squares = jnp.sum(m2 + count * (mean - joint) ** 2, axis=0)
    return {
        "count": total,
        "mean": joint.astype(mean.dtype),
        "m2": squares.astype(m2.dtype),
    }


_MERGE = {"average": _merge_averages, "welford": _merge_moments}


def _replace(tree: dict, path: Path, function: Any) -> dict:
    """Returns a nested dict with the part at a path replaced by a function of it."""
    if not path:
        return function(tree)
    name, *rest = path
    return {**tree, name: _replace(tree[name], tuple(rest), function)}
