"""Diagnostics of a synchronisation: consensus distance, update norms and cosines."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from optax.tree_utils import tree_get_all_with_path

from localsgd_jax.core import collectives
from localsgd_jax.core.averaging import check_inexact
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pieces import Piece, sum_over_vectors
from localsgd_jax.core.pytrees import promote, split_rows, where
from localsgd_jax.core.types import (
    PyTree,
    RuleMetrics,
    RuleState,
    SyncContext,
    SyncRule,
)
from localsgd_jax.core.validation import check_rule
from localsgd_jax.rules.common_result import check_common_result

MOMENTUM_FIELDS = ("trace", "mu")  # names in the optax states of SGD and Adam


def with_diagnostics(rule: SyncRule) -> SyncRule:
    """Records consensus distance, update norms and cosines at each synchronisation.

    With the anchor x̄, the synchronised parameters of the last round, Δₖ = x̄ − xₖ,
    normalised weights pₖ = wₖ / Σⱼ wⱼ and the mean Δ̄ = Σₖ pₖ Δₖ, the history columns
    are

        consensus_distance   √(Σₖ pₖ ‖xₖ − Σⱼ pⱼ xⱼ‖²)
        delta_norm           ‖Δ̄‖, and delta_norm.NAME for each top-level key of the tree
        cosine               mean cosine of Δⱼ and Δₖ over pairs of active workers
        momentum_cosine      cosine of Δ̄ and the outer momentum, if the rule has one
        effective_workers    (Σₖ wₖ)² / Σₖ wₖ², the effective number of workers

    They cost nothing in local steps. A synchronisation also sends an all-to-all of the
    tree, half the bytes of a mean, and K² numbers for each top-level key.

    Args:
      rule: any rule after which all workers are equal.

    Returns:
      A rule with the anchor in its shared state.

    Raises:
      TypeError: if `rule` is not a rule; at `init`, for a leaf that is not floating
        point or complex.
      ValueError: when traced, if workers are not equal after each round of the rule.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.with_diagnostics(lsgd.diloco())

    References:
      Kong et al., Consensus Control for Decentralized Deep Learning, 2021, section 3:
      the consensus distance. arXiv:2102.04828
    """
    check_rule("with_diagnostics(rule)", rule)

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        check_inexact("with_diagnostics()", tree)
        inner = rule.init(tree, specs)
        names = ["consensus_distance", "delta_norm", "cosine", "effective_workers"]
        names += [f"delta_norm.{key}" for key in _leaves_by_top_level_key(tree)]
        names += ["momentum_cosine"] if _find_momentum(inner.shared) is not None else []
        metrics = RuleMetrics({name: jnp.float32(0) for name in names})
        return RuleState((tree, metrics, inner.shared), inner.local)

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        anchor, metrics, rule_shared = state.shared
        rule_state, call = RuleState(rule_shared, state.local), "with_diagnostics(rule)"
        check_common_result(call, rule, tree, rule_state, context)
        any_active, active_context = collectives.any_participants(context)
        scalars = _compute_diagnostics(
            anchor, tree, _find_momentum(rule_shared), active_context
        )
        metrics = where(any_active, RuleMetrics(scalars), metrics)
        tree, inner = rule.apply(tree, rule_state, context)
        anchor = where(any_active, collectives.assume_replicated(tree), anchor)
        return tree, RuleState((anchor, metrics, inner.shared), inner.local)

    return SyncRule(init, apply, name=call_name("with_diagnostics", rule))


def _compute_diagnostics(
    anchor: PyTree, tree: PyTree, momentum: PyTree | None, context: SyncContext
) -> dict[str, jax.Array]:
    """Returns the metrics of `with_diagnostics` for one round."""
    delta = jax.tree.map(jnp.subtract, promote(anchor), promote(tree))
    # Zeros replace inactive workers, whose numbers may not be finite.
    active = collectives.is_active(context)
    delta = where(active, delta, jax.tree.map(jnp.zeros_like, delta))
    weights = collectives.gathered_weights(context)
    normalized = weights / weights.sum()
    specs = _leaves_by_top_level_key(context.specs)
    grams = {
        key: _gram_matrix(leaves, context._replace(specs=specs.get(key)))
        for key, leaves in _leaves_by_top_level_key(delta).items()
    }
    zeros = jnp.zeros((len(weights), len(weights)))
    gram = functools.reduce(jnp.add, grams.values(), zeros)
    squared_norms = jnp.diagonal(gram)
    squared_mean_norm = normalized @ gram @ normalized
    scalars = {
        "consensus_distance": _safe_sqrt(
            normalized @ squared_norms - squared_mean_norm
        ),
        "delta_norm": _safe_sqrt(squared_mean_norm),
        "cosine": _mean_cosine(gram, weights > 0),
        "effective_workers": weights.sum() ** 2 / (weights**2).sum(),
    }
    for key, matrix in grams.items():
        scalars[f"delta_norm.{key}"] = _safe_sqrt(normalized @ matrix @ normalized)
    if momentum is not None:
        product = _inner_product(delta, promote(momentum))
        products = collectives.all_gather(product, context)
        norms = optax.tree.norm(promote(momentum)) * scalars["delta_norm"]
        scalars["momentum_cosine"] = (
            normalized @ products / jnp.where(norms > 0, norms, 1)
        )
    return {name: jnp.asarray(x, jnp.float32) for name, x in scalars.items()}


def _gram_matrix(tree: PyTree, context: SyncContext) -> jax.Array:
    """Returns Re ⟨Δⱼ, Δₖ⟩ for all pairs of workers, (K, K), summed over chunks."""

    def gram(piece: Piece, vector: jax.Array) -> jax.Array:
        rows = split_rows(vector, collectives.size(piece.context))
        chunks = collectives.all_to_all(rows, piece.context)
        products = jnp.real(jnp.conj(chunks) @ chunks.T)
        return collectives.psum(products, piece.context)

    return sum_over_vectors(gram, context, tree)


def _inner_product(a: PyTree, b: PyTree) -> jax.Array:
    """Returns Re ⟨a, b⟩; unlike `optax.tree.vdot` without flattening sharded leaves."""
    products = jax.tree.map(lambda x, y: jnp.sum(jnp.real(jnp.conj(x) * y)), a, b)
    return jax.tree.reduce(jnp.add, products, jnp.float32(0))


def _mean_cosine(gram: jax.Array, active: jax.Array) -> jax.Array:
    """Returns the mean cosine over pairs of different active workers."""
    squared_norms = jnp.diagonal(gram)
    norms = jnp.sqrt(jnp.maximum(squared_norms, jnp.finfo(gram.dtype).tiny))
    pairs = active[:, None] & active[None, :] & ~jnp.eye(len(gram), dtype=bool)
    cosines = gram / (norms[:, None] * norms[None, :])
    return jnp.where(pairs, cosines, 0).sum() / jnp.maximum(pairs.sum(), 1)


def _leaves_by_top_level_key(tree: PyTree) -> dict[str, Sequence[jax.Array]]:
    """Groups the leaves of a tree by the top-level key of their path."""
    groups = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        key = jax.tree_util.keystr(path[:1], simple=True) or "tree"
        groups.setdefault(key, []).append(leaf)
    return groups


def _find_momentum(shared: PyTree) -> PyTree | None:
    """Returns the momentum of an outer optimizer, or None."""
    for name in MOMENTUM_FIELDS:
        matches = tree_get_all_with_path(shared, name)
        if matches:
            return matches[0][1]
    return None


def _safe_sqrt(x: jax.Array) -> jax.Array:
    """Returns √max(x, 0); rounding may make a square slightly negative."""
    return jnp.sqrt(jnp.maximum(x, 0))
