"""Mean model over workers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from localsgd_jax.core import train_state
from localsgd_jax.core.pytrees import promote
from localsgd_jax.core.types import PyTree, State
from localsgd_jax.distributed import arrays


def consensus(state: State, field: str | Sequence[str] | None = "params") -> PyTree:
    """Returns the mean model over workers.

        x̄ = (1/K) Σₖ xₖ

    The mean is accumulated in float32 or wider. Leaves without a mean (integers, PRNG
    keys) are taken from worker 0. If the state spans several processes, all of them
    must call `consensus`; each returns its own copy.

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
    fields = select_fields(state.workers, field)
    return arrays.local_replica(mean_over_workers(fields))


def select_fields(workers: PyTree, field: str | Sequence[str] | None) -> PyTree:
    """Returns the fields of the train state averaged by `consensus`.

    Args:
      workers: train state.
      field: as in `consensus`.

    Returns:
      The field; for several names a dict of them; for None the whole train state.

    Raises:
      ValueError: if the train state has no such field.
    """
    if field is None:
        return workers
    if isinstance(field, str):
        return train_state.get_fields(workers, (field,))[field]
    return train_state.get_fields(workers, tuple(field))


@jax.jit
def mean_over_workers(tree: PyTree) -> PyTree:
    """Averages leaves over the worker axis; integers and keys keep row 0."""

    def mean(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x[0]
        return jnp.mean(promote(x), axis=0).astype(x.dtype)

    return jax.tree.map(mean, tree)
