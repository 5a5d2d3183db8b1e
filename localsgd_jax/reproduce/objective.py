"""f − f* of many points at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.experiments import logistic
from localsgd_jax.experiments.datasets import Dataset

MOST = 64
BLOCK = 16


def suboptimality(dataset: Dataset, minimum: float) -> Callable:
    """Makes the function that evaluates f − f*.

    Equal examples are counted instead of repeated, which is exact. Losses are computed
    in float32 and added up in float64: good to about 1e-6.

    Args:
      dataset: the examples.
      minimum: f*.

    Returns:
      From points `(m, d)` to f − f* `(m,)`, infinite where f is not finite.
    """
    signed, share = _distinct(dataset)
    l2 = logistic.penalty(dataset)

    @jax.jit
    def blocks(signed: jax.Array, share: jax.Array, points: jax.Array) -> jax.Array:
        margins = signed @ points.T
        # log(1 + exp(−m)) without overflow, and cheaper than logaddexp.
        losses = jnp.log1p(jnp.exp(-jnp.abs(margins))) - jnp.minimum(margins, 0)
        return (share[:, None] * losses).reshape(-1, BLOCK, len(points)).sum(axis=1)

    def some(points: np.ndarray) -> np.ndarray:
        fit = np.asarray(blocks(signed, share, _padded(points)), np.float64).sum(axis=0)
        wide = points.astype(np.float64)
        return fit[: len(points)] + l2 / 2 * np.sum(wide * wide, axis=1) - minimum

    def all_points(points: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            parts = [some(points[i : i + MOST]) for i in range(0, len(points), MOST)]
        errors = np.concatenate(parts)
        return np.where(np.isfinite(errors), errors, np.inf)

    return all_points


def _distinct(dataset: Dataset) -> tuple[jax.Array, jax.Array]:
    """Returns the distinct yᵢaᵢ and the share of the examples that each stands for."""
    dense = dataset.features.astype(np.float32).toarray()
    signed = np.ascontiguousarray(dense * dataset.labels[:, None].astype(np.float32))
    signed += 0.0  # Minus zero and zero are equal, but their bytes are not.
    as_bytes = signed.view(np.dtype((np.void, signed[0].nbytes)))[:, 0]
    _, first, count = np.unique(as_bytes, return_index=True, return_counts=True)
    share = (count / len(signed)).astype(np.float32)
    # Short float32 sums, since a long one of equal numbers would lose two digits.
    fill = -len(first) % BLOCK
    signed = np.pad(signed[first], ((0, fill), (0, 0)))
    return jnp.asarray(signed), jnp.asarray(np.pad(share, (0, fill)))


def _padded(points: np.ndarray) -> np.ndarray:
    """Fills up to a power of two points, so that few programs are compiled."""
    size = 1 << (len(points) - 1).bit_length()
    return np.pad(points, ((0, size - len(points)), (0, 0)))
