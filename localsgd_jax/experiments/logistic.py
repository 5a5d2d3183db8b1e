"""Logistic regression with an l2 penalty: the loss, f, f* and its curvature."""

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import linalg
from scipy.special import expit

from localsgd_jax.experiments.datasets import Dataset

_CERTAIN = 1e-14


def penalty(dataset: Dataset) -> float:
    """Returns λ = 1/n."""
    return 1 / dataset.examples


def loss_fn(dataset: Dataset) -> Callable:
    """Makes the loss of a batch, for `local_sgd`.

        f(x; ξ) = (1/B) Σ log(1 + exp(−yᵢ aᵢᵀx)) + (λ/2) ‖x‖²,   λ = 1/n

    Args:
      dataset: gives n.

    Returns:
      `loss(x, (a, y))` with leaves `(B, d)` and `(B,)`.

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


def value(dataset: Dataset, x: np.ndarray) -> float:
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


def minimum(dataset: Dataset) -> float:
    """Returns f* = min f to machine precision, by Newton's method in float64.

    Since f is λ-strongly convex the gradient proves the result:

        f(x) − f* ≤ ‖∇f(x)‖² / (2λ)

    Args:
      dataset: the examples.

    Returns:
      f*.

    Raises:
      ValueError: if that bound is above 1e-14.
    """
    from sklearn.linear_model import LogisticRegression

    # One Cholesky factor per step, or where that is too large conjugate gradients.
    small = dataset.dimension <= 4096
    solver = LogisticRegression(
        C=1.0,  # λ = 1/(C n)
        fit_intercept=False,
        solver="newton-cholesky" if small else "newton-cg",
        tol=1e-14,
        max_iter=1000,
    )
    with warnings.catch_warnings():
        # At machine precision line searches complain; the bound below decides.
        warnings.simplefilter("ignore")
        x = solver.fit(dataset.features, dataset.labels).coef_[0]
    slope = gradient(dataset, x)
    error = slope @ slope / (2 * penalty(dataset))
    if not error <= _CERTAIN:
        raise ValueError(
            f"{dataset.name}: f* is known to {error:.1e} only, not to {_CERTAIN:g}; "
            "rescale the features, best to the range [-1, 1]"
        )
    return value(dataset, x)


def batch_curvature(dataset: Dataset, batch: int) -> float:
    """Returns the curvature that bounds the step size for batches of B examples.

        L_B = λ + (1 − 1/B) λmax(AᵀA)/(4n) + (1/B) Σ ‖aᵢ‖²/(4n)

    From B = 1, where every example pulls alone, it falls to the smoothness of f.

    Args:
      dataset: the examples aᵢ, rows of A.
      batch: B.

    Returns:
      L_B.

    References:
      Ma, Bassily, Belkin, The Power of Interpolation, 2018, on the step size for
      least squares, with the largest ‖aᵢ‖² for the mean. arXiv:1712.06559
    """
    features = dataset.features
    rows = linalg.norm(features) ** 2
    short = min(dataset.examples, dataset.dimension)
    if short == 1:
        top = rows
    else:
        start = np.random.default_rng(0).normal(size=short)
        _, singular, _ = linalg.svds(features, k=1, v0=start)
        top = singular[0] ** 2
    mix = (1 - 1 / batch) * top + rows / batch
    return penalty(dataset) + float(mix) / (4 * dataset.examples)
