"""How far apart workers are, measured where they meet."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from localsgd_jax import collectives
from localsgd_jax.base import Context, Notes, PyTree, RuleState, SyncRule
from localsgd_jax.rules.combine import check_rule
from localsgd_jax.rules.compression import cut
from localsgd_jax.rules.mean import check_has_mean
from localsgd_jax.trees import choose, flat, widen

_MOMENTA = ("trace", "mu")  # What optax calls them in SGD and in Adam.


def measured(rule: SyncRule) -> SyncRule:
    """Measures the workers at each synchronisation and notes it in the history.

    With the anchor x̄ that was agreed on last, Δₖ = x̄ − xₖ, shares pₖ = wₖ / Σⱼ wⱼ and
    the mean Δ̄ = Σₖ pₖ Δₖ, the columns are

        consensus_distance   √(Σₖ pₖ ‖xₖ − Σⱼ pⱼ xⱼ‖²)
        delta_norm           ‖Δ̄‖, and delta_norm.NAME for each top entry of the tree
        cosine               mean cosine of Δⱼ and Δₖ over the pairs that take part
        momentum_cosine      cosine of Δ̄ and the outer momentum, if the rule has one
        participants         (Σₖ wₖ)² / Σₖ wₖ², the effective number of workers

    Paid only in a round: an all-to-all of the tree, half of what a mean sends, and K²
    numbers for each entry. The rule must make workers agree.

    Args:
      rule: any rule after which workers agree.

    Returns:
      A rule that also remembers the anchor.

    Raises:
      TypeError: if `rule` is not a rule.

    Example:
      >>> import localsgd_jax as lsgd
      >>> rule = lsgd.measured(lsgd.diloco())

    References:
      Kong et al., Consensus Control for Decentralized Deep Learning, 2021, section 3:
      the consensus distance. arXiv:2102.04828
    """
    check_rule("measured(rule)", rule)

    def init(tree: PyTree) -> RuleState:
        check_has_mean("measured()", tree)
        inner = rule.init(tree)
        names = ["consensus_distance", "delta_norm", "cosine", "participants"]
        names += [f"delta_norm.{name}" for name in _groups(tree)]
        names += ["momentum_cosine"] if _momentum(inner.agreed) is not None else []
        notes = Notes(dict.fromkeys(names, jnp.float32(0)))
        return RuleState((tree, notes, inner.agreed), inner.own)

    def apply(
        tree: PyTree, state: RuleState, context: Context
    ) -> tuple[PyTree, RuleState]:
        anchor, notes, remembered = state.agreed
        anyone, somebody = collectives.present(context)
        seen = _measure(anchor, tree, _momentum(remembered), somebody)
        notes = choose(anyone, Notes(seen), notes)
        before = RuleState(remembered, state.own)
        tree, inner = rule.apply(tree, before, context)
        anchor = choose(anyone, collectives.equal(tree), anchor)
        return tree, RuleState((anchor, notes, inner.agreed), inner.own)

    return SyncRule(init, apply)


def _measure(
    anchor: PyTree, tree: PyTree, momentum: PyTree | None, context: Context
) -> dict[str, jax.Array]:
    """Returns the numbers of a round."""
    delta = jax.tree.map(jnp.subtract, widen(anchor), widen(tree))
    if context.weight is not None:  # Those who are absent may be no numbers.
        delta = choose(context.weight > 0, delta, jax.tree.map(jnp.zeros_like, delta))
    weight = collectives.shares(context)
    share = weight / weight.sum()
    groups = _groups(delta).items()
    parts = {name: _inner_products(part, context) for name, part in groups}
    gram = sum(parts.values())
    own = jnp.diagonal(gram)
    mean = share @ gram @ share
    lengths = jnp.sqrt(jnp.maximum(own, jnp.finfo(own.dtype).tiny))
    pairs = (weight[:, None] > 0) & (weight[None, :] > 0)
    pairs &= ~jnp.eye(len(own), dtype=bool)
    cosines = gram / (lengths[:, None] * lengths[None, :])
    count = jnp.maximum(pairs.sum(), 1)
    numbers = {
        "consensus_distance": _root(share @ own - mean),
        "delta_norm": _root(mean),
        "cosine": jnp.where(pairs, cosines, 0).sum() / count,
        "participants": weight.sum() ** 2 / (weight**2).sum(),
    }
    for name, part in parts.items():
        numbers[f"delta_norm.{name}"] = _root(share @ part @ share)
    if momentum is not None:
        along = collectives.gather(jnp.vdot(flat(delta), flat(momentum)), context)
        length = jnp.linalg.norm(flat(momentum)) * _root(mean)
        numbers["momentum_cosine"] = share @ along / jnp.where(length > 0, length, 1)
    return {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()}


def _inner_products(tree: PyTree, context: Context) -> jax.Array:
    """Returns ⟨Δⱼ, Δₖ⟩ for all workers, (K, K): each multiplies a piece."""
    rows = cut(flat(tree), collectives.size(context))
    pieces = collectives.transpose(rows, context)
    return collectives.total(pieces @ pieces.T, context)


def _groups(tree: PyTree) -> dict[str, Sequence[jax.Array]]:
    """Returns the leaves below each entry at the top of a tree."""
    groups = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path[:1], simple=True) or "tree"
        groups.setdefault(name, []).append(leaf)
    return groups


def _momentum(agreed: PyTree) -> PyTree | None:
    """Returns the momentum of an outer optimizer."""
    for name in _MOMENTA:
        found = optax.tree_utils.tree_get_all_with_path(agreed, name)
        if found:
            return found[0][1]
    return None


def _root(square: jax.Array) -> jax.Array:
    """Returns a root; what rounding has made negative counts as zero."""
    return jnp.sqrt(jnp.maximum(square, 0))
