"""Initial state of workers: replication, per-worker keys and shardings."""

from functools import partial

import jax
import jax.numpy as jnp

from localsgd_jax.core import pytrees, validation
from localsgd_jax.core.types import Algorithm, PerWorker, PyTree, State
from localsgd_jax.distributed import arrays
from localsgd_jax.execution.layout import Layout


def init_state(algorithm: Algorithm, layout: Layout, params: PyTree) -> State:
    """Initialises one worker and replicates it over the workers of a layout.

    Args:
      algorithm: initialises the worker and the rule state.
      layout: positions of the workers.
      params: arrays, or `jax.ShapeDtypeStruct`s.

    Returns:
      The state before the first step. For abstract parameters its leaves are
      `jax.ShapeDtypeStruct`s, with shardings where the layout has a mesh.
    """
    count, single = layout.num_workers, _init_single(algorithm, params)
    abstract = pytrees.is_abstract(params)
    if layout.mesh is None:
        if abstract:
            return jax.eval_shape(partial(_replicate, count), single)
        return jax.jit(_replicate, static_argnums=0)(count, single)
    shardings = _shardings(layout, single)
    if abstract:
        state = jax.eval_shape(partial(_replicate, count), single)
        return pytrees.with_shardings(state, shardings)
    placed = jax.tree.map(
        lambda x: arrays.device_put_global(x, layout.shared_sharding(x)), single
    )
    program = jax.jit(_replicate, static_argnums=0, out_shardings=shardings)
    return program(count, placed)


def fold_in_workers(key: jax.Array, indices: jax.Array) -> jax.Array:
    """Derives a PRNG key per worker by folding in the worker index.

        keyₖ = fold_in(key, k)

    Args:
      key: typed keys of any shape S.
      indices: worker indices, `(N,)`.

    Returns:
      Typed keys `(N, *S)`.

    Example:
      >>> fold_in_workers(jax.random.key(0), jnp.arange(3)).shape
      (3,)
    """
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
    return fold(key.reshape(-1), indices).reshape(len(indices), *key.shape)


def is_key(x: jax.Array) -> bool:
    """Returns whether a leaf is an array of typed PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _init_single(algorithm: Algorithm, params: PyTree) -> State:
    """Initialises a state with one worker and no worker axis."""
    if pytrees.is_abstract(params):
        abstract = jax.eval_shape(algorithm.init, params)
        worker, rule_state = pytrees.shard_like_params(abstract, params)
    else:
        worker, rule_state = algorithm.init(params)
    zero = jnp.int32(0)
    return State(zero, zero, worker, rule_state.local, rule_state.shared)


def _replicate(count: int, single: State) -> State:
    """Adds a worker axis to the train state and local rule state."""
    # Every leaf is copied, since a buffer that occurs twice cannot be donated.
    copied = jax.tree.map(lambda x: _strip_weak_type(jnp.copy(x)), single)
    leaf = partial(_replicate_leaf, count)
    workers, local = jax.tree.map(
        leaf, (copied.workers, copied.local), is_leaf=_is_per_worker
    )
    return copied._replace(workers=workers, local=local)


def _replicate_leaf(count: int, x: jax.Array | PerWorker) -> jax.Array | PerWorker:
    """Repeats a leaf K times; folds worker indices into PRNG keys."""
    if isinstance(x, PerWorker):
        validation.check_worker_axis(
            "init(params): PerWorker leaves of RuleState.local", x.tree, count
        )
        return x
    if is_key(x):
        return fold_in_workers(x, jnp.arange(count))
    return jnp.broadcast_to(x, (count, *x.shape))


def _shardings(layout: Layout, single: State) -> State:
    """Returns the sharding of each leaf of the replicated state."""

    def local(x: jax.Array | PerWorker) -> PyTree:
        if _is_per_worker(x):
            return jax.tree.map(lambda _: layout.batch_sharding(), x)
        return layout.worker_sharding(x)

    return jax.tree.map(layout.shared_sharding, single)._replace(
        workers=jax.tree.map(layout.worker_sharding, single.workers),
        local=jax.tree.map(local, single.local, is_leaf=_is_per_worker),
    )


def _is_per_worker(x: PyTree) -> bool:
    """Returns whether a subtree has a worker axis already."""
    return isinstance(x, PerWorker)


def _strip_weak_type(x: jax.Array) -> jax.Array:
    """Removes the weak type, which Python numbers have."""
    return x.astype(x.dtype) if x.weak_type else x
