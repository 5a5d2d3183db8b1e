"""Logistic regression with an l2 penalty: loss, objective, optimum and curvature."""

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import linalg
from scipy.special import expit

from localsgd_jax.experiments.datasets import Dataset

MAX_OPTIMALITY_GAP = 1e-14
_MAX_CHOLESKY_DIMENSION = 4096
_MAX_POINTS = 64
_SUM_LENGTH = 16


def penalty(dataset: Dataset) -> float:
    """Returns the l2 penalty λ = 1/n."""
    return 1 / dataset.examples


def loss_fn(dataset: Dataset) -> Callable:
    """Returns the loss of a batch, for `local_sgd`.

        f(x; ξ) = (1/B) Σ log(1 + exp(−yᵢ aᵢᵀx)) + (λ/2) ‖x‖²,   λ = 1/n

    Args:
      dataset: the dataset, which defines n.

    Returns:
      `loss(x, (a, y))` with x `(d,)`, a `(B, d)` and y `(B,)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from localsgd_jax.experiments.datasets import digits
      >>> loss = loss_fn(digits())
      >>> round(float(loss(jnp.zeros(64), (jnp.ones((4, 64)), jnp.ones(4)))), 6)
      0.693147
    """
    l2 = penalty(dataset)

    def loss(x: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        features, labels = batch
        fit = jnp.mean(jax.nn.softplus(-labels * (features @ x)))
        return fit + l2 / 2 * jnp.vdot(x, x)

    return loss


def objective(dataset: Dataset, x: np.ndarray) -> float:
    """Returns f(x) over all examples, in float64 on the host.

    Args:
      dataset: the examples.
      x: `(d,)`.

    Returns:
      f(x); not finite if x is not.
    """
    x = np.asarray(x, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        margins = dataset.labels * (dataset.features @ x)
        return float(np.logaddexp(0, -margins).mean() + penalty(dataset) / 2 * (x @ x))


def gradient(dataset: Dataset, x: np.ndarray) -> np.ndarray:
    """Returns ∇f(x) over all examples, in float64 on the host.

    Args:
      dataset: the examples.
      x: `(d,)`.

    Returns:
      The gradient `(d,)`.
    """
    x = np.asarray(x, np.float64)
    slopes = -dataset.labels * expit(-dataset.labels * (dataset.features @ x))
    return dataset.features.T @ slopes / len(slopes) + penalty(dataset) * x


def optimal_value(dataset: Dataset) -> float:
    """Returns f* = min f to machine precision, by Newton's method in float64.

    Since f is λ-strongly convex, the gradient bounds the error:

        f(x) − f* ≤ ‖∇f(x)‖² / (2λ)

    Args:
      dataset: the examples.

    Returns:
      f*.

    Raises:
      ValueError: if that bound is above 1e-14.
    """
    from sklearn.linear_model import LogisticRegression

    # A Cholesky factor per step; conjugate gradients where that would be too large.
    cholesky = dataset.dimension <= _MAX_CHOLESKY_DIMENSION
    solver = LogisticRegression(
        C=1.0,  # λ = 1/(C n)
        fit_intercept=False,
        solver="newton-cholesky" if cholesky else "newton-cg",
        tol=1e-14,
        max_iter=1000,
    )
    with warnings.catch_warnings():
        # Line searches warn at machine precision; the bound below decides instead.
        warnings.simplefilter("ignore")
        x = solver.fit(dataset.features, dataset.labels).coef_[0]
    slope = gradient(dataset, x)
    error = slope @ slope / (2 * penalty(dataset))
    if not error <= MAX_OPTIMALITY_GAP:
        raise ValueError(
            f"{dataset.name}: the error of f* must be at most {MAX_OPTIMALITY_GAP:g}, "
            f"got {error:.1e}; rescale the features, best to [-1, 1]"
        )
    return objective(dataset, x)


def suboptimality_fn(dataset: Dataset, minimum: float) -> Callable:
    """Returns a function that evaluates f − f* of many points on the device.

    Duplicate examples are merged into one with a weight, which is exact. Losses are
    computed in float32 and summed in float64; the error is about 1e-6.

    Args:
      dataset: the examples.
      minimum: f*.

    Returns:
      A function from points `(m, d)` to f − f* `(m,)`, infinite where f is not finite.
    """
    signed, weights = _distinct_examples(dataset)
    l2 = penalty(dataset)

    @jax.jit
    def partial_sums(
        signed: jax.Array, weights: jax.Array, points: jax.Array
    ) -> jax.Array:
        margins = signed @ points.T
        # log(1 + exp(−m)) without overflow, and cheaper than logaddexp.
        losses = jnp.log1p(jnp.exp(-jnp.abs(margins))) - jnp.minimum(margins, 0)
        blocks = (weights[:, None] * losses).reshape(-1, _SUM_LENGTH, len(points))
        return blocks.sum(axis=1)

    def evaluate_block(points: np.ndarray) -> np.ndarray:
        sums = partial_sums(signed, weights, _pad_to_power_of_two(points))
        fit = np.asarray(sums, np.float64).sum(axis=0)[: len(points)]
        wide = points.astype(np.float64)
        return fit + l2 / 2 * np.sum(wide * wide, axis=1) - minimum

    def suboptimality(points: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            blocks = [
                evaluate_block(points[i : i + _MAX_POINTS])
                for i in range(0, len(points), _MAX_POINTS)
            ]
        errors = np.concatenate(blocks)
        return np.where(np.isfinite(errors), errors, np.inf)

    return suboptimality


def batch_curvature(dataset: Dataset, batch: int) -> float:
    """Returns the curvature that bounds the step size for batches of B examples.

        L_B = λ + (1 − 1/B) λmax(AᵀA)/(4n) + (1/B) Σ ‖aᵢ‖²/(4n)

    It decreases from the mean squared norm at B = 1 to the smoothness of f.

    Args:
      dataset: the examples aᵢ, rows of A.
      batch: B.

    Returns:
      L_B.

    References:
      Ma, Bassily, Belkin, The Power of Interpolation, 2018, on the step size for
      least squares, with the largest ‖aᵢ‖² instead of the mean. arXiv:1712.06559
    """
    features = dataset.features
    rows = linalg.norm(features) ** 2
    rank = min(dataset.examples, dataset.dimension)
    if rank == 1:
        top = rows
    else:
        start = np.random.default_rng(0).normal(size=rank)
        _, singular, _ = linalg.svds(features, k=1, v0=start)
        top = singular[0] ** 2
    mixture = (1 - 1 / batch) * top + rows / batch
    return penalty(dataset) + float(mixture) / (4 * dataset.examples)


def _distinct_examples(dataset: Dataset) -> tuple[jax.Array, jax.Array]:
    """Returns the distinct yᵢaᵢ and the fraction of the examples equal to each."""
    dense = dataset.features.astype(np.float32).toarray()
    signed = np.ascontiguousarray(dense * dataset.labels[:, None].astype(np.float32))
    signed += 0.0  # Minus zero and zero are equal, but their bytes differ.
    as_bytes = signed.view(np.dtype((np.void, signed[0].nbytes)))[:, 0]
    _, first, count = np.unique(as_bytes, return_index=True, return_counts=True)
    weights = (count / len(signed)).astype(np.float32)
    # Padding for sums of 16: a long float32 sum of equal numbers loses two digits.
    padding = -len(first) % _SUM_LENGTH
    signed = np.pad(signed[first], ((0, padding), (0, 0)))
    return jnp.asarray(signed), jnp.asarray(np.pad(weights, (0, padding)))


def _pad_to_power_of_two(points: np.ndarray) -> np.ndarray:
    """Pads to a power of two points, which bounds the number of compilations."""
    size = 1 << (len(points) - 1).bit_length()
    return np.pad(points, ((0, size - len(points)), (0, 0)))
