"""The constants of a problem: exactly, or from samples along a run."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.theory.constants import Constants, check_curvature, require


def logistic_curvature(features, penalty: float) -> tuple[float, float]:
    """Finds μ and L of regularised logistic regression, exactly.

        f(x) = (1/n) Σᵢ log(1 + exp(−yᵢaᵢᵀx)) + (λ/2)‖x‖²
        μ = λ,  L = λₘₐₓ(AᵀA)/(4n) + λ

    Args:
      features: A, of shape (n, d); no intercept is added.
      penalty: λ.

    Returns:
      (μ, L).

    Raises:
      ValueError: if λ ≤ 0.

    Example:
      >>> logistic_curvature(np.array([[2.0], [2.0]]), penalty=0.5)
      (0.5, 1.5)
    """
    require(
        penalty > 0, "logistic_curvature(penalty)", "penalty must be positive", penalty
    )
    features = np.asarray(features, np.float64)
    top = np.linalg.eigvalsh(features.T @ features)[-1]
    return penalty, float(top) / (4 * len(features)) + penalty


def quadratic_curvature(hessian) -> tuple[float, float]:
    """Finds μ and L of f(x) = ½xᵀAx − bᵀx: the extreme eigenvalues of A.

    Args:
      hessian: A, symmetric, of shape (d, d).

    Returns:
      (μ, L).

    Raises:
      ValueError: if A is not symmetric or not positive definite.

    Example:
      >>> quadratic_curvature(np.diag([3.0, 1.0]))
      (1.0, 3.0)
    """
    hessian, call = np.asarray(hessian, np.float64), "quadratic_curvature(hessian)"
    skew = float(np.abs(hessian - hessian.T).max())
    symmetric = np.allclose(hessian, hessian.T)
    require(symmetric, call, "hessian must be symmetric", f"|A - A^T| = {skew}")
    mu, smoothness = (float(v) for v in np.linalg.eigvalsh(hessian)[[0, -1]])
    require(mu > 0, call, "hessian must be positive definite", f"mu = {mu}")
    return mu, smoothness


def estimate(
    loss: Callable, examples, path: Iterable, mu: float, smoothness: float
) -> Constants:
    """Estimates the constants of a run: σ² and G² as the largest met on its path.

        σ² = maxₓ (1/n)Σᵢ‖∇fᵢ(x) − ∇f(x)‖²,  G² = maxₓ (1/n)Σᵢ‖∇fᵢ(x)‖²

    Exact if `examples` are all the data and `path` is all the iterates.

    Args:
      loss: `loss(params, example)`, of a single example, with its penalty.
      examples: pytree whose leaves have a leading axis n.
      path: some of the run's parameters, one after another.
      mu, smoothness: μ and L, as from `logistic_curvature` or `quadratic_curvature`.

    Returns:
      The constants.

    Raises:
      ValueError: if the path is empty, μ ≤ 0 or L < μ.

    Example:
      >>> loss = lambda x, b: (x - b) ** 2 / 2
      >>> estimate(loss, jnp.array([-1.0, 1.0]), [2.0, 1.0], mu=1.0, smoothness=1.0)
      Constants(mu=1.0, smoothness=1.0, variance=1.0, second_moment=5.0)
    """
    check_curvature("estimate", mu, smoothness)

    @jax.jit
    def moments(params, examples):
        gradients = jax.vmap(jax.grad(loss), (None, 0))(params, examples)
        noise = jax.tree.map(lambda g: g - g.mean(0, keepdims=True), gradients)
        return _mean_square(noise), _mean_square(gradients)

    met = [moments(params, examples) for params in path]
    require(met, "estimate(path)", "path must hold at least 1 point", len(met))
    variance, second_moment = (float(max(m)) for m in zip(*met, strict=True))
    return Constants(mu, smoothness, variance, second_moment)


def _mean_square(gradients):
    """Mean over the leading axis of the squared norm of a pytree."""
    return sum(jnp.sum(g**2) / len(g) for g in jax.tree.leaves(gradients))
