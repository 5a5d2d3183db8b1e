"""The constants of a problem: exactly, or from samples along a run."""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

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


def curvature(
    loss: Callable, examples, path: Iterable, iterations: int = 512
) -> tuple[float, float]:
    """Estimates μ and L of a run: the extreme curvatures met on its path.

        μ = minₓ (θ₁ − r₁),  L = maxₓ (θₘ + rₘ)

    with the Ritz values θ₁ ≤ … ≤ θₘ of ∇²f(x) after m Lanczos iterations from a random
    vector. Within rᵢ, the norm of a Ritz vector's residual, lies an eigenvalue, after
    the first few iterations the extreme one. So what has not converged errs to the safe
    side, as does rounding, 10 ε θₘ: a smaller μ cannot be told from 0. An iteration
    takes a Hessian-vector product of all examples and the memory of a few vectors.

    Args:
      loss: `loss(params, example)`, of a single example, with its penalty.
      examples: pytree whose leaves have a leading axis n.
      path: some of the run's parameters, one after another.
      iterations: the most at a point; fewer once θ₁ and θₘ are known to 1 %.

    Returns:
      (μ, L); μ ≤ 0 if f is not strongly convex, or not known to be.

    Raises:
      ValueError: if the path is empty, or a Hessian on it not finite.

    Example:
      >>> loss = lambda x, b: x @ jnp.diag(jnp.array([1.0, 3.0])) @ x / 2 - b @ x
      >>> mu, smoothness = curvature(loss, jnp.ones((4, 2)), [jnp.zeros(2)])
      >>> round(mu, 4), round(smoothness, 4)
      (1.0, 3.0)

    References:
      Lanczos, J. Res. Nat. Bur. Standards 45, 1950. Zhou and Li, Linear Algebra and its
      Applications 435, 2011, for the bounds.
    """

    @jax.jit
    def product(params, examples, vector):
        flat, unravel = ravel_pytree(jax.tree.map(_wide, params))

        def mean(x):
            return jnp.mean(jax.vmap(loss, (None, 0))(unravel(x), examples))

        return jax.jvp(jax.grad(mean), (flat,), (vector,))[1]

    met = []
    for params in path:
        flat, _ = ravel_pytree(jax.tree.map(_wide, params))
        start = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
        met.append(_extremes(partial(product, params, examples), start, iterations))
    require(met, "curvature(path)", "path must hold at least 1 point", len(met))
    least, most = zip(*met, strict=True)
    return min(least), max(most)


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


def _extremes(product: Callable, start, iterations: int) -> tuple[float, float]:
    """Extreme eigenvalues of a symmetric operator by Lanczos' three-term recurrence."""
    before, now, norm = jnp.zeros_like(start), start / jnp.linalg.norm(start), 0.0
    diagonal, beside = [], []
    while True:
        # βₘvₘ₊₁ = Avₘ − αₘvₘ − βₘ₋₁vₘ₋₁. Vectors that lose orthogonality only find
        # the same extremes again.
        after = product(now) - norm * before
        diagonal.append(float(now @ after))
        after = after - diagonal[-1] * now
        norm = float(jnp.linalg.norm(after))
        finite = np.isfinite(diagonal[-1]) and np.isfinite(norm)
        require(finite, "curvature(loss)", "its Hessian must be finite", diagonal[-1])
        rounding = 10 * float(jnp.finfo(start.dtype).eps) * max(map(abs, diagonal))
        ended = norm <= rounding or len(diagonal) == iterations
        if ended or len(diagonal) % 16 == 0:
            values, slack = _ritz(diagonal, beside, norm)
            slack = np.maximum(slack, rounding)
            if ended or (slack <= np.maximum(0.01 * np.abs(values), rounding)).all():
                return float(values[0] - slack[0]), float(values[1] + slack[1])
        before, now = now, after / norm
        beside.append(norm)


def _ritz(diagonal, beside, norm):
    """The two extreme eigenvalues of a tridiagonal matrix, and their residuals."""
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, -1))
    return values[[0, -1]], norm * np.abs(vectors[-1, [0, -1]])


def _wide(x):
    """In float32 at least: second derivatives in half precision are mostly rounding."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _mean_square(gradients):
    """Mean over the leading axis of the squared norm of a pytree."""
    return sum(jnp.sum(g**2) / len(g) for g in jax.tree.leaves(gradients))
