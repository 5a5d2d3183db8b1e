"""Corrections of stale updates: a decay by age, and alignment with the momentum."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from localsgd_jax.asynchronous.aggregation import (
    Aggregation,
    UpdateContext,
    pseudo_gradient,
    resolve_weighting,
)
from localsgd_jax.core.pytrees import promote
from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check_number, check_type

_EPSILON = 1e-12


def cosine_gated_weighting(cutoff: float, decay: float = 0.1) -> Callable:
    """Returns an exponential staleness weighting with a smooth cutoff.

        w(s) = ½ (1 + cos(π s / S)) e^(−α s)   for s < S
        w(s) = 0                               for s ≥ S

    `server_optimizer(optax.adam(rate), cosine_gated_weighting(cutoff))` is Cosine-Gated
    Adam-Decay: the weight scales a pseudo-gradient before it enters both moments.
    Without stale updates it is Adam.

    The source gives the product of a cosine gate and an exponential. The half cosine
    and the default of α are choices of this library.

    Args:
      cutoff: S, staleness in updates from which on an update counts nothing, positive.
      decay: α, at least 0.

    Returns:
      A weighting for `server_optimizer`, `delayed_nesterov` and `aligned_nesterov`.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> weighting = cosine_gated_weighting(cutoff=8, decay=0.0)
      >>> [round(float(weighting(s)), 3) for s in (0, 4, 8, 9)]
      [1.0, 0.5, 0.0, 0.0]

    References:
      Shah, Sun, Cosine-Gated Adam-Decay: Drop-In Staleness-Aware Outer Optimization for
      Decoupled DiLoCo, 2026. arXiv:2605.09126
    """
    call = "cosine_gated_weighting"
    cutoff = check_number(f"{call}(cutoff)", "cutoff", cutoff, above=0)
    decay = check_number(f"{call}(decay)", "decay", decay, at_least=0)

    def weighting(staleness: jax.typing.ArrayLike) -> jax.Array:
        age = jnp.minimum(jnp.asarray(staleness, jnp.float32), cutoff)
        gate = (1 + jnp.cos(jnp.pi * age / cutoff)) / 2
        return gate * jnp.exp(-decay * age)

    return weighting


def align_to_momentum(
    gradient: PyTree,
    momentum: PyTree,
    threshold: float = 0.2,
    max_shrinkage: float = 0.5,
    strength: float = 1.0,
    scale: float = 1.0,
) -> PyTree:
    """Corrects each tensor of a pseudo-gradient that opposes the momentum.

    With the unit vectors û of the tensor Δ and v̂ of the momentum m, and c = ûᵀv̂:

        conf = ‖Δ‖ / (‖Δ‖ + κ ‖m‖)
        Δ                                            if c ≥ c₀
        Δ − β c ‖Δ‖ v̂,    β = min(k |c| conf, β_max)   if c < 0
        ‖Δ‖ ũ / ‖ũ‖,      ũ = (1 − λ) û + λ v̂          otherwise,
                          λ = min(1, k (1 − c / c₀) conf)

    A tensor whose norm or momentum is 0 stays as it is. The form of λ, and k = κ = 1,
    are choices of this library: λ is continuous at c = c₀. The other equations and the
    defaults are from descriptions of the paper.

    Args:
      gradient: Δ, a tree of tensors.
      momentum: m, a tree of the same structure.
      threshold: c₀, in (0, 1].
      max_shrinkage: β_max, in [0, 1].
      strength: k, at least 0.
      scale: κ, at least 0.

    Returns:
      A tree with the structure, shapes and dtypes of `gradient`.

    Example:
      >>> import jax.numpy as jnp
      >>> align_to_momentum(jnp.array([2.0, 0]), jnp.array([-2.0, 0]))
      Array([1., 0.], dtype=float32)

    References:
      Al Asif et al., HeLoCo: Efficient Asynchronous Low-Communication Training under
      Data and Device Heterogeneity, 2026. arXiv:2606.00271
    """
    call = "align_to_momentum"
    check_number(f"{call}(threshold)", "threshold", threshold, above=0)
    name = "max_shrinkage"
    check_number(f"{call}({name})", name, max_shrinkage, at_least=0, at_most=1)
    check_number(f"{call}(strength)", "strength", strength)
    check_number(f"{call}(scale)", "scale", scale)

    def align(delta: jax.Array, m: jax.Array) -> jax.Array:
        norm, m_norm = jnp.linalg.norm(delta), jnp.linalg.norm(m)
        unit, m_unit = (
            x / jnp.maximum(n, _EPSILON) for x, n in ((delta, norm), (m, m_norm))
        )
        cosine = jnp.sum(unit * m_unit)
        confidence = norm / jnp.maximum(norm + scale * m_norm, _EPSILON)
        beta = jnp.minimum(strength * jnp.abs(cosine) * confidence, max_shrinkage)
        shrunk = delta - beta * cosine * norm * m_unit
        share = jnp.minimum(strength * (1 - cosine / threshold) * confidence, 1)
        mixed = (1 - share) * unit + share * m_unit
        turned = norm * mixed / jnp.maximum(jnp.linalg.norm(mixed), _EPSILON)
        keep = (cosine >= threshold) | (norm == 0) | (m_norm == 0)
        return jnp.where(keep, delta, jnp.where(cosine < 0, shrunk, turned))

    aligned = jax.tree.map(align, promote(gradient), promote(momentum))
    return optax.tree_utils.tree_cast_like(aligned, gradient)


def aligned_nesterov(
    learning_rate: float,
    momentum: float = 0.9,
    *,
    weighting: Callable | None = None,
    align: Callable[[PyTree, PyTree], PyTree] = align_to_momentum,
) -> Aggregation:
    """Applies Nesterov momentum to updates that are aligned with it.

    With the weight w of the staleness s:

        g = w(s) align(−pₖ, m) / K
        m ← μ m + g
        z ← z − η (μ m + g)

    With `align_to_momentum` it is HeLoCo; an `align` that returns its first argument
    gives `server_optimizer(optax.sgd(η, μ, nesterov=True), weighting)`.

    Args:
      learning_rate: η, positive.
      momentum: μ, in [0, 1).
      weighting: function from the staleness to a weight; None for
        `constant_weighting()`.
      align: `align(gradient, momentum) -> gradient`.

    Returns:
      An aggregation whose state is the momentum m, in the structure of the aggregate.

    Raises:
      TypeError: if `weighting` or `align` is not callable.
      ValueError: if a number is out of range.

    Example:
      >>> aggregation = aligned_nesterov(0.7, 0.9)

    References:
      Al Asif et al., HeLoCo: Efficient Asynchronous Low-Communication Training under
      Data and Device Heterogeneity, 2026. arXiv:2606.00271
    """
    call = "aligned_nesterov"
    name = "learning_rate"
    learning_rate = check_number(f"{call}({name})", name, learning_rate, above=0)
    momentum = check_number(
        f"{call}(momentum)", "momentum", momentum, at_least=0, below=1
    )
    weighting = resolve_weighting(f"{call}(weighting)", weighting)
    check_type(f"{call}(align)", "align", align, Callable)

    def init(aggregate: PyTree) -> PyTree:
        return jax.tree.map(jnp.zeros_like, aggregate)

    def apply(
        aggregate: PyTree, update: PyTree, state: PyTree, context: UpdateContext
    ) -> tuple[PyTree, PyTree]:
        aligned = align(jax.tree.map(jnp.negative, update), state)
        # The weighting scales −pₖ; here the sign is part of the alignment already.
        gradient = pseudo_gradient(
            weighting, jax.tree.map(jnp.negative, aligned), context.staleness
        )
        gradient = jax.tree.map(lambda g: g / context.num_workers, gradient)
        state = jax.tree.map(lambda m, g: momentum * m + g, state, gradient)
        aggregate = jax.tree.map(
            lambda z, m, g: z - learning_rate * (momentum * m + g),
            aggregate,
            state,
            gradient,
        )
        return aggregate, state

    return Aggregation(init, apply)
