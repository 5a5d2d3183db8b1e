"""The averaged model."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from localsgd_jax import fields, processes
from localsgd_jax.base import PyTree, State


def consensus(state: State, field: str | Sequence[str] | None = "params") -> PyTree:
    """Returns the averaged model.

        x̄ = (1/K) Σₖ xₖ

    The mean is accumulated in float32 at least; what has no mean (integers, keys) is
    taken from worker 0. Where several processes hold the state all of them must call
    it, and each gets a copy of its own.

    Args:
      state: state of a cluster, synchronised or not.
      field: the field of the train state that holds the model; for several names a
        dict of them; for None the whole train state.

    Returns:
      The model, without worker axis.

    Raises:
      ValueError: if the train state has no such field.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5),
      ...                            rule=lsgd.average())
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> state, _ = cluster.step(cluster.init(jnp.zeros(())), jnp.array([1.0, 3.0]))
      >>> consensus(state)
      Array(2., dtype=float32)
    """
    if field is None:
        return processes.at_hand(_mean_of_workers(state.workers))
    names = (field,) if isinstance(field, str) else tuple(field)
    found = processes.at_hand(_mean_of_workers(fields.read(state.workers, names)))
    return found[field] if isinstance(field, str) else found


@jax.jit
def _mean_of_workers(tree: PyTree) -> PyTree:
    """Averages over the leading axis."""

    def mean(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x[0]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.mean(x, axis=0, dtype=wide).astype(x.dtype)

    return jax.tree.map(mean, tree)
