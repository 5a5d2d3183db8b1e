"""Initial state of workers: replication, per-worker keys and shardings."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from localsgd_jax.core import pytrees, validation
from localsgd_jax.core.pieces import infer_specs, unwrap, with_specs
from localsgd_jax.core.pytrees import is_key
from localsgd_jax.core.types import Algorithm, PerWorker, PyTree, State, StateSpecs
from localsgd_jax.distributed import arrays
from localsgd_jax.execution.layout import Layout


def init_state(
    algorithm: Algorithm,
    layout: Layout,
    params: PyTree,
    *,
    make_params: Callable[[], PyTree] | None = None,
    first: int = 0,
    num_workers: int | None = None,
) -> State:
    """Initialises one worker and replicates it over the workers of a layout.

    On a mesh one program creates the state from the parameters, so that no other copy
    of the state exists.

    Args:
      algorithm: initialises the worker and the rule state.
      layout: positions of the workers.
      params: arrays, or `jax.ShapeDtypeStruct`s.
      make_params: makes the arrays, if `params` only describes them.
      first: global index of the first worker of the layout.
      num_workers: K, if the layout holds only a part of the workers.

    Returns:
      The state before the first step. For abstract parameters its leaves are
      `jax.ShapeDtypeStruct`s, with shardings where the layout has a mesh.
    """
    indices = range(first, first + layout.num_workers)
    total, specs = num_workers or len(indices), layout.inner_specs(params)
    if layout.mesh is None and not pytrees.is_abstract(params):
        single = _init_single(algorithm, layout, specs, params)
        return _jitted_replicate(indices, total, single)

    def build(params: PyTree) -> State:
        single = _init_single(algorithm, layout, specs, params)
        return _replicate(indices, total, single)

    shapes = jax.eval_shape(build, params)
    if layout.mesh is None:
        return shapes
    shardings = layout.state_shardings(shapes)
    if make_params is not None:
        return jax.jit(lambda: build(make_params()), out_shardings=shardings)()
    if pytrees.is_abstract(params):
        return pytrees.with_shardings(shapes, shardings)
    placed = jax.tree.map(
        lambda x: arrays.device_put_global(x, layout.shared_sharding(x)), params
    )
    return jax.jit(build, out_shardings=shardings)(placed)


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


def _init_single(
    algorithm: Algorithm, layout: Layout, specs: PyTree | None, params: PyTree
) -> State:
    """Initialises a state with one worker and no worker axis."""
    with layout.ambient():
        worker, rule_state = algorithm.init(params, specs)
    state_specs = None
    if specs is not None:
        worker_specs = infer_specs(worker, params, specs)
        rule_state = with_specs(rule_state, worker, worker_specs)
        state_specs = StateSpecs(
            tuple(jax.tree.leaves(worker_specs)),
            rule_state.local.specs,
            rule_state.shared.specs,
        )
    shared, local = unwrap(rule_state.shared), unwrap(rule_state.local)
    zero = jnp.int32(0)
    return State(zero, zero, worker, local, shared, state_specs)


def _replicate(indices: range, num_workers: int, single: State) -> State:
    """Adds a worker axis to the train state and local rule state."""
    # Every leaf is copied, since a buffer that occurs twice cannot be donated.
    copied = jax.tree.map(lambda x: _strip_weak_type(jnp.copy(x)), single)
    leaf = partial(_replicate_leaf, indices, num_workers)
    workers, local = jax.tree.map(
        leaf, (copied.workers, copied.local), is_leaf=_is_per_worker
    )
    return copied._replace(workers=workers, local=local)


_jitted_replicate = jax.jit(_replicate, static_argnums=(0, 1))


def _replicate_leaf(
    indices: range, num_workers: int, x: jax.Array | PerWorker
) -> jax.Array | PerWorker:
    """Repeats a leaf for each worker; folds worker indices into PRNG keys."""
    if isinstance(x, PerWorker):
        call = "init(params): PerWorker leaves of RuleState.local"
        validation.check_worker_axis(call, x.tree, num_workers)
        return jax.tree.map(lambda rows: rows[indices.start : indices.stop], x)
    if is_key(x):
        return fold_in_workers(x, jnp.arange(indices.start, indices.stop))
    return jnp.broadcast_to(x, (len(indices), *x.shape))


def _is_per_worker(x: PyTree) -> bool:
    """Returns whether a subtree has a worker axis already."""
    return isinstance(x, PerWorker)


def _strip_weak_type(x: jax.Array) -> jax.Array:
    """Removes the weak type, which Python numbers have."""
    return x.astype(x.dtype) if x.weak_type else x
