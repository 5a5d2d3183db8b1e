"""NumPy reference of Algorithm 1 in float64, and its problems in NumPy and JAX."""

import jax.numpy as jnp
import numpy as np


def reference_local_sgd(gradient, x0, batches, eta, due):
    """Returns all iterates of Algorithm 1, shape (T + 1, K, d).

    It follows the pseudocode of the paper:

    for t = 0 … T − 1, for k = 1 … K:
        vₖ = xₜᵏ − ηₜ ∇f(xₜᵏ; ξₜᵏ)
        xₜ₊₁ᵏ = (1/K) Σⱼ vⱼ if t + 1 ∈ I, else vₖ
    """
    workers = len(batches[0][0])
    iterates = [np.array([x0] * workers, dtype=np.float64)]
    for t, batch in enumerate(batches):
        v = np.empty_like(iterates[-1])
        for k in range(workers):
            example = tuple(leaf[k] for leaf in batch)
            v[k] = iterates[-1][k] - eta(t) * gradient(iterates[-1][k], *example)
        if t + 1 in due:
            mean = sum(v) / workers
            v = np.array([mean] * workers)
        iterates.append(v)
    return np.array(iterates)


def quadratic_gradient(x, rows, targets):
    """Returns ∇ of (1/2B) ‖A x − b‖²."""
    return rows.T @ (rows @ x - targets) / len(targets)


def logistic_gradient(x, rows, labels, decay=0.01):
    """Returns ∇ of (1/B) Σ log(1 + exp(−yᵢ aᵢᵀx)) + (λ/2) ‖x‖²."""
    weight = -labels / (1 + np.exp(labels * (rows @ x)))
    return rows.T @ weight / len(labels) + decay * x


def quadratic_loss(x, batch):
    """Returns (1/2B) ‖A x − b‖², in JAX."""
    rows, targets = batch
    return 0.5 * jnp.mean((rows @ x - targets) ** 2)


def logistic_loss(x, batch, decay=0.01):
    """Returns (1/B) Σ log(1 + exp(−yᵢ aᵢᵀx)) + (λ/2) ‖x‖², in JAX."""
    rows, labels = batch
    return jnp.mean(jnp.logaddexp(0, -labels * (rows @ x))) + decay / 2 * x @ x


def step_size(t):
    """Returns the step size ηₜ of the comparisons with the reference."""
    return 0.4 / (1 + 0.1 * t)
