"""Parallel training step for an existing loop."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from localsgd_jax.core.algorithm import Rules, from_train_step
from localsgd_jax.core.step_arguments import from_arguments, num_batch_arguments
from localsgd_jax.core.types import Algorithm, Cluster, PyTree, State
from localsgd_jax.core.validation import (
    check,
    check_int,
    check_state,
    check_type,
    check_worker_axis,
)
from localsgd_jax.data.splitting import split_batch
from localsgd_jax.distributed.meshes import worker_mesh
from localsgd_jax.execution.placement import on_mesh
from localsgd_jax.execution.rounds import gated
from localsgd_jax.training.run_context import train_schedule


def parallelize(
    train_step: Callable | Algorithm,
    *train_state: PyTree,
    workers: int,
    schedule: int | Callable,
    rule: Rules = None,
    mesh: Any = None,
    axis: str = "worker",
    drop_remainder: bool = False,
) -> tuple[State, Callable]:
    """Converts the training step of an existing loop to K workers.

        sₖ ← train_step(sₖ, ξₖ),  k = 1, …, K;   s ← sync(s) if schedule(t)

    Each batch of the loop is split over the workers by `split_batch`: with the batches
    of the plain loop, a worker has n / K examples. The step does not return before its
    program is dispatched, and does not wait for it.

    Args:
      train_step: `train_step(train_state, *batch)` of one worker, with any result that
        `from_train_step` accepts; with several values in `train_state`, as in
        `from_arguments`; or an algorithm, such as from `from_linen` or `from_nnx`.
      *train_state: initial train state, or initial values of the first arguments.
      workers: K.
      schedule: a period, or a schedule: a predicate on the number of local steps.
      rule: as in `from_train_step`; an algorithm has its own.
      mesh: mesh with the axis `axis`; None for the devices that K allows.
      axis: as in `on_mesh`.
      drop_remainder: as in `split_batch`.

    Returns:
      The state of the workers, and `step(state, *batch) -> (state, metrics)`, compiled,
      with metrics `(K, ...)`. Further arguments are split as the batch: keys become a
      different key for each worker, numbers are repeated. The state is donated.
      `consensus(state, None)` returns the train state of the mean model.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if an argument is out of range, or a rule is given for an algorithm.

    Example:
      >>> import jax.numpy as jnp
      >>> import localsgd_jax as lsgd
      >>> def train_step(params, batch):
      ...     return params - 0.5 * (params - batch.mean(0))
      >>> state, step = lsgd.parallelize(
      ...     lambda state, batch: {"params": train_step(state["params"], batch)},
      ...     {"params": jnp.zeros(())}, workers=2, schedule=1)
      >>> for batch in [jnp.array([1.0, 3.0]), jnp.array([1.0, 3.0])]:
      ...     state, metrics = step(state, batch)
      >>> lsgd.consensus(state)
      Array(1.5, dtype=float32)
    """
    workers = check_int("parallelize(workers)", "workers", workers, 1)
    algorithm, start = _as_algorithm(train_step, train_state, rule)
    schedule = train_schedule(schedule)
    mesh = worker_mesh(workers, axis=axis) if mesh is None else mesh
    cluster = on_mesh(algorithm, mesh, workers, axis=axis)
    run = jax.jit(gated(cluster, schedule), donate_argnums=0)
    step = partial(_split_and_run, cluster, run, drop_remainder)
    return cluster.init(start), step


def _as_algorithm(
    train_step: Callable | Algorithm, train_state: tuple[PyTree, ...], rule: Rules
) -> tuple[Algorithm, PyTree]:
    """Returns the algorithm and the train state of one worker."""
    call = "parallelize"
    if not train_state:
        raise ValueError(
            f"{call}(*train_state): at least one initial value is needed, got ()"
        )
    start, *others = train_state
    if isinstance(train_step, Algorithm):
        text = "an algorithm has its own rule"
        check(rule is None, f"{call}(rule)", text, rule)
        text = "an algorithm has one train state"
        check(not others, f"{call}(*train_state)", text, len(train_state))
        return train_step, start
    check_type(f"{call}(train_step)", "train_step", train_step, Callable)
    if others:
        return from_arguments(train_step, *train_state, rule=rule)
    if num_batch_arguments(train_step, 1) == 1:
        return from_train_step(train_step, rule), start
    return from_train_step(lambda state, batch: train_step(state, *batch), rule), start


def _split_and_run(
    cluster: Cluster, run: Callable, drop_remainder: bool, state: State, *batch: Any
) -> tuple[State, PyTree]:
    """Splits a batch over the workers and dispatches a step."""
    # A donated array in a program of several devices can end the process.
    check_state("step(state)", state)
    check_worker_axis("step(state)", state.workers, cluster.num_workers)
    check(batch, "step(*batch)", "at least one argument is needed", batch)
    single = batch[0] if len(batch) == 1 else batch
    parts = split_batch(single, cluster.num_workers, drop_remainder=drop_remainder)
    return run(state, cluster.shard_batch(parts))
