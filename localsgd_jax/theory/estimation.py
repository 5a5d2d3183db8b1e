"""Problem constants: exact, or estimated along a trajectory."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from localsgd_jax.core.pytrees import promote
from localsgd_jax.core.validation import (
    check,
    check_array_leaves,
    check_int,
    check_number,
    check_type,
)
from localsgd_jax.theory.constants import Constants, check_curvature


def logistic_curvature(features, penalty: float) -> tuple[float, float]:
    """Returns μ and L of regularised logistic regression, exactly.

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
    call = "logistic_curvature"
    penalty = check_number(f"{call}(penalty)", "penalty", penalty, above=0)
    features = _finite_matrix(f"{call}(features)", "features", features)
    top = np.linalg.eigvalsh(features.T @ features)[-1]
    return penalty, float(top) / (4 * len(features)) + penalty


def quadratic_curvature(hessian) -> tuple[float, float]:
    """Returns μ and L of a quadratic function, exactly.

        f(x) = ½xᵀAx − bᵀx
        μ = λₘᵢₙ(A),  L = λₘₐₓ(A)

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
    call = "quadratic_curvature(hessian)"
    hessian = _finite_matrix(call, "hessian", hessian)
    is_square = hessian.shape[0] == hessian.shape[1]
    check(is_square, call, "hessian must be square", f"shape {hessian.shape}")
    skew = float(np.abs(hessian - hessian.T).max())
    symmetric = np.allclose(hessian, hessian.T)
    check(symmetric, call, "hessian must be symmetric", f"|A - A^T| = {skew}")
    mu, smoothness = (float(v) for v in np.linalg.eigvalsh(hessian)[[0, -1]])
    check(mu > 0, call, "hessian must be positive definite", f"mu = {mu}")
    return mu, smoothness


def curvature(
    loss: Callable, examples, path: Iterable, iterations: int = 512
) -> tuple[float, float]:
    """Estimates μ and L along a trajectory, from the extreme curvatures.

        μ = minₓ (θ₁ − r₁),  L = maxₓ (θₘ + rₘ)

    with the Ritz values θ₁ ≤ … ≤ θₘ of ∇²f(x) after m Lanczos iterations from a random
    vector. An eigenvalue lies within rᵢ, the residual norm of a Ritz vector, of θᵢ;
    after the first few iterations it is the extreme one. Unconverged Ritz values
    therefore give conservative estimates, as does the allowance for rounding, 10 ε θₘ:
    a smaller μ is indistinguishable from 0. An iteration takes a Hessian-vector product
    of all examples and the memory of a few vectors.

    Args:
      loss: `loss(params, example)`, of a single example, with its penalty.
      examples: pytree with leaves `(n, ...)`.
      path: parameters at some points of the trajectory.
      iterations: largest number at a point; fewer if θ₁ and θₘ are known to 1 %.

    Returns:
      (μ, L); μ ≤ 0 if f is not strongly convex, or this could not be shown.

    Raises:
      ValueError: if the path is empty or a Hessian is not finite.

    Example:
      >>> loss = lambda x, b: x @ jnp.diag(jnp.array([1.0, 3.0])) @ x / 2 - b @ x
      >>> mu, smoothness = curvature(loss, jnp.ones((4, 2)), [jnp.zeros(2)])
      >>> round(mu, 4), round(smoothness, 4)
      (1.0, 3.0)

    References:
      Lanczos, J. Res. Nat. Bur. Standards 45, 1950. Zhou and Li, Linear Algebra and its
      Applications 435, 2011, for the residual bounds.
    """

    @jax.jit
    def product(params, examples, vector):
        # Second derivatives in half precision are dominated by rounding errors.
        flat, unravel = ravel_pytree(promote(params))

        def mean(x):
            return jnp.mean(jax.vmap(loss, (None, 0))(unravel(x), examples))

        return jax.jvp(jax.grad(mean), (flat,), (vector,))[1]

    _check_functions("curvature", loss, examples, path)
    check_int("curvature(iterations)", "iterations", iterations, 1)
    estimates = []
    for params in _points("curvature", path):
        flat, _ = ravel_pytree(promote(params))
        start = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
        estimates.append(
            _lanczos_extremes(partial(product, params, examples), start, iterations)
        )
    _check_path("curvature", estimates)
    lower, upper = zip(*estimates, strict=True)
    return min(lower), max(upper)


def estimate(
    loss: Callable, examples, path: Iterable, mu: float, smoothness: float
) -> Constants:
    """Estimates σ² and G² as their largest values on a trajectory.

        σ² = maxₓ (1/n)Σᵢ‖∇fᵢ(x) − ∇f(x)‖²,  G² = maxₓ (1/n)Σᵢ‖∇fᵢ(x)‖²

    Exact if `examples` are all the data and `path` is all the iterates.

    Args:
      loss: `loss(params, example)`, of a single example, with its penalty.
      examples: pytree with leaves `(n, ...)`.
      path: parameters at some points of the trajectory.
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
    _check_functions("estimate", loss, examples, path)

    @jax.jit
    def moments(params, examples):
        gradients = jax.vmap(jax.grad(loss), (None, 0))(params, examples)
        noise = jax.tree.map(lambda g: g - g.mean(0, keepdims=True), gradients)
        return _mean_square(noise), _mean_square(gradients)

    estimates = [moments(x, examples) for x in _points("estimate", path)]
    _check_path("estimate", estimates)
    variance, second_moment = (float(max(m)) for m in zip(*estimates, strict=True))
    return Constants(mu, smoothness, variance, second_moment)


def _lanczos_extremes(product: Callable, start, iterations: int) -> tuple[float, float]:
    """Bounds the extreme eigenvalues of a symmetric operator by Lanczos iteration.

    The residual bounds are needed for conservative estimates; the eigenvalue solvers of
    SciPy do not return them.
    """
    previous, current, norm = jnp.zeros_like(start), start / jnp.linalg.norm(start), 0.0
    diagonal, off_diagonal = [], []
    while True:
        # βₘvₘ₊₁ = Avₘ − αₘvₘ − βₘ₋₁vₘ₋₁, without reorthogonalisation: vectors that lose
        # orthogonality only repeat Ritz values that have been found.
        following = product(current) - norm * previous
        diagonal.append(float(current @ following))
        following = following - diagonal[-1] * current
        norm = float(jnp.linalg.norm(following))
        finite = np.isfinite(diagonal[-1]) and np.isfinite(norm)
        check(finite, "curvature(loss)", "its Hessian must be finite", diagonal[-1])
        rounding = 10 * float(jnp.finfo(start.dtype).eps) * max(map(abs, diagonal))
        ended = norm <= rounding or len(diagonal) == iterations
        if ended or len(diagonal) % 16 == 0:
            values, residuals = _extreme_ritz_values(diagonal, off_diagonal, norm)
            margin = np.maximum(residuals, rounding)
            if ended or (margin <= np.maximum(0.01 * np.abs(values), rounding)).all():
                return float(values[0] - margin[0]), float(values[1] + margin[1])
        previous, current = current, following / norm
        off_diagonal.append(norm)


def _extreme_ritz_values(
    diagonal: list[float], off_diagonal: list[float], norm: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the smallest and largest Ritz value, and their residual norms."""
    # Only the lower triangle is read.
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(off_diagonal, -1))
    return values[[0, -1]], norm * np.abs(vectors[-1, [0, -1]])


def _finite_matrix(call: str, name: str, matrix: object) -> np.ndarray:
    """Returns a matrix in float64; raises unless it is real, finite and not empty."""
    check_array_leaves(call, name, matrix if hasattr(matrix, "dtype") else [matrix])
    array = np.asarray(matrix)
    if np.iscomplexobj(array):
        raise TypeError(f"{call}: {name} must be real, got {array.dtype}")
    shaped = array.ndim == 2 and array.size > 0
    check(shaped, call, f"{name} must be a matrix", f"shape {array.shape}")
    array = array.astype(np.float64)
    bad = array[~np.isfinite(array)]
    check(not bad.size, call, f"{name} must be finite", *bad[:1])
    return array


def _check_functions(call: str, loss: Callable, examples: object, path: object) -> None:
    """Raises a TypeError unless the arguments are a function, arrays and points."""
    check_type(f"{call}(loss)", "loss", loss, Callable)
    check_type(f"{call}(path)", "path", path, Iterable)
    check_array_leaves(f"{call}(examples)", "examples", examples)


def _points(call: str, path: Iterable) -> Iterator:
    """Yields the points of a trajectory; raises a TypeError if a leaf is no array."""
    for params in path:
        check_array_leaves(f"{call}(path)", "path", params)
        yield params


def _check_path(call: str, estimates: list) -> None:
    """Raises a ValueError if a trajectory has no points."""
    rule = "path must hold at least 1 point"
    check(estimates, f"{call}(path)", rule, len(estimates))


def _mean_square(gradients):
    """Returns the mean over rows of the squared norm of a pytree."""
    return sum(jnp.sum(g**2) / len(g) for g in jax.tree.leaves(gradients))
