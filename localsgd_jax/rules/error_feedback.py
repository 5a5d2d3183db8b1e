"""Error feedback for compressed means: compression errors are sent in later rounds."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax.tree_utils import tree_cast_like

from localsgd_jax.core import collectives
from localsgd_jax.core.averaging import check_floating
from localsgd_jax.core.pieces import NUM_VECTORS, Piece, map_vectors
from localsgd_jax.core.pytrees import promote, where
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check_rule

MeanAxes = tuple[str, ...] | None


class ErrorFeedback(NamedTuple):
    """Compression errors of one worker, the local state of a compressed mean.

    Attributes:
      worker_error: error of the messages that this worker sent; shapes of the tree,
        float32 at least.
      server_error: error of the chunk of the mean that this worker sent, zero outside
        its chunk, in the same form; None for rules that do not compress the mean.
    """

    worker_error: PyTree
    server_error: PyTree | None = None


def compressed_mean(
    call: str,
    axes: MeanAxes,
    exchange: Callable,
    *,
    name: str,
    has_server_error: bool = False,
    num_vectors: int = NUM_VECTORS,
) -> SyncRule:
    """Makes a rule from a compressed exchange, with error feedback.

    With the worker error eₖ and the server error fₖ:

        xₖ, eₖ, fₖ ← exchange(xₖ + eₖ, fₖ)

    An inactive worker sends zeros and keeps eₖ. If all weights are 0, nothing changes;
    `exchange` then keeps fₖ.

    Args:
      call: the public function, such as "top_k", for messages.
      axes: worker axes of the mean; None for all of them.
      exchange: `exchange(piece, vector, server_error=None) -> vectors`; the vectors are
        the mean, the new worker error and, with a server error, the new server error.
        The argument is the concatenated tree plus the worker error, `(N,)`. It is
        called for each of several parts of a large tree, and if the worker is sharded
        for each group of leaves, on each device with its piece; see
        `core.pieces.map_vectors`.
      name: name of the rule.
      has_server_error: whether the state has a server error.
      num_vectors: as for `core.pieces.map_vectors`.

    Returns:
      A rule with an `ErrorFeedback` for each worker.
    """

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        check_floating(f"{call}()", tree)
        zeros = jax.tree.map(jnp.zeros_like, promote(tree))
        server_error = zeros if has_server_error else None
        return RuleState(local=ErrorFeedback(zeros, server_error))

    def exchange_if_active(
        piece: Piece, message: jax.Array, old_error: jax.Array, *server_error: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Keeps the error of an inactive worker, vector by vector to save memory."""
        mean, error, *new_server_error = exchange(piece, message, *server_error)
        active = collectives.is_active(piece.context, axes)
        return mean, where(active, error, old_error), *new_server_error

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        if not any(x.size for x in jax.tree.leaves(tree)):
            return tree, state
        any_active, _ = collectives.any_participants(context)
        active = collectives.is_active(context, axes)
        old = collectives.assume_replicated_within(state.local, context, axes)
        zeros = jax.tree.map(jnp.zeros_like, old.worker_error)
        message = jax.tree.map(jnp.add, promote(tree), old.worker_error)
        message = where(active, message, zeros)
        server_error = (old.server_error,) if has_server_error else ()
        mean, *errors = map_vectors(
            exchange_if_active,
            context,
            message,
            old.worker_error,
            *server_error,
            num_vectors=num_vectors,
        )
        return (
            where(any_active, tree_cast_like(mean, tree), tree),
            RuleState(local=ErrorFeedback(*errors)),
        )

    return SyncRule(init, apply, name=name)


def check_mean(call: str, rule: SyncRule) -> MeanAxes:
    """Returns the worker axes of a plain mean; raises for any other rule.

    Args:
      call: the public function, such as "quantize", for messages.
      rule: its argument.

    Returns:
      Names of worker axes; None for all of them.

    Raises:
      TypeError: if `rule` is not a rule.
      ValueError: if it is not a plain mean.
    """
    check_rule(f"{call}(rule)", rule)
    if rule.mean_axes is None:
        raise ValueError(
            f"{call}(rule): it must be a plain mean such as average(), got {rule!r}; "
            f"compress inside an outer rule: outer(optimizer, {call}(average(), ...))"
        )
    return rule.mean_axes or None


def weighted_or_zero(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Multiplies by weights; the product with weight 0 is 0 even for NaN and Inf."""
    return jnp.where(weights > 0, weights * values, 0)


def safe_total(weights: jax.Array) -> jax.Array:
    """Returns the sum of the weights, or 1 if it is 0, as a divisor."""
    return jnp.where((total := jnp.sum(weights)) > 0, total, 1)
