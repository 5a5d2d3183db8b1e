"""Local steps of the lanes of a position: batched, or one after another."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from localsgd_jax.core.types import PyTree
from localsgd_jax.execution.local_step import convolves


def map_step(
    step: Callable, worker_map: str | None, lanes: int, on_cpu: bool
) -> Callable:
    """Maps the step of one worker over the lanes of a position.

    Args:
      step: `step(worker, batch) -> (worker, metrics)` of one worker.
      worker_map: as in `on_mesh`.
      lanes: number of lanes R.
      on_cpu: whether the step runs on CPUs.

    Returns:
      A function of the same arguments, with leaves `(R, ...)`.
    """
    if lanes == 1:
        return partial(_unbatched_step, step)

    def mapped(workers: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        if _is_batched(step, worker_map, on_cpu, workers, batch):
            return jax.vmap(step)(workers, batch)
        return jax.lax.map(lambda pair: step(*pair), (workers, batch))

    return mapped


def _is_batched(
    step: Callable,
    worker_map: str | None,
    on_cpu: bool,
    workers: PyTree,
    batch: PyTree,
) -> bool:
    """Returns whether the lanes are batched.

    On CPUs a convolution with a batch axis of kernels takes several times the time of
    the same convolutions one after another.
    """
    if worker_map is not None or not on_cpu:
        return worker_map != "map"
    # The lanes below have the types of these, so that the step is traced once.
    return not convolves(jax.vmap(step), workers, batch)


def _unbatched_step(
    step: Callable, workers: PyTree, batch: PyTree
) -> tuple[PyTree, PyTree]:
    """Runs the step of a single lane without batch axis.

    The leaves are `(1, ...)`. On CPUs a matrix product with a batch axis of size one is
    a fifth slower, and vmap would turn conditionals of the step into selects.
    """
    single = jax.tree.map(lambda x: x[0], (workers, batch))
    return jax.tree.map(lambda x: jnp.asarray(x)[None], step(*single))
