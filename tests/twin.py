"""Algorithm 1 of the paper in plain NumPy float64, written from its pseudocode."""

import numpy as np


def local_sgd(gradient, x0, batches, eta, due):
    """Returns all iterates, shape (T + 1, K, d).

    for t = 0 … T − 1, for k = 1 … K:
        vₖ = xₜᵏ − ηₜ ∇f(xₜᵏ; ξₜᵏ)
        xₜ₊₁ᵏ = (1/K) Σⱼ vⱼ if t + 1 ∈ I, else vₖ
    """
    workers = len(batches[0][0])
    iterates = [np.array([x0] * workers, dtype=np.float64)]
    for t, batch in enumerate(batches):
        v = np.empty_like(iterates[-1])
        for k in range(workers):
            own = tuple(part[k] for part in batch)
            v[k] = iterates[-1][k] - eta(t) * gradient(iterates[-1][k], *own)
        if t + 1 in due:
            mean = sum(v) / workers
            v = np.array([mean] * workers)
        iterates.append(v)
    return np.array(iterates)


def quadratic_gradient(x, rows, targets):
    """∇ of (1/2B) ‖A x − b‖²."""
    return rows.T @ (rows @ x - targets) / len(targets)


def logistic_gradient(x, rows, labels, decay=0.01):
    """∇ of (1/B) Σ log(1 + exp(−yᵢ aᵢᵀx)) + (λ/2) ‖x‖²."""
    weight = -labels / (1 + np.exp(labels * (rows @ x)))
    return rows.T @ weight / len(labels) + decay * x
