"""Comparison of the processes of a run before the first dispatch."""

import zlib
from collections.abc import Callable

import jax

from localsgd_jax.core.types import Cluster, PyTree, State
from localsgd_jax.data.prefetch import SynchronizedPrefetcher
from localsgd_jax.distributed import arrays
from localsgd_jax.distributed.coordination import assert_equal_across_processes
from localsgd_jax.schedules.schedule import Schedule
from localsgd_jax.training.callbacks import Callbacks
from localsgd_jax.training.run_context import RunContext, RunSettings


def assert_equal_runs(
    cluster: Cluster,
    state: State,
    context: RunContext,
    prefetcher: SynchronizedPrefetcher,
    callbacks: Callbacks,
    settings: RunSettings,
) -> None:
    """Raises the same error in all processes unless their runs are equal.

    Processes that run different programs deadlock in their first collective, so the
    arguments of `train`, the state, the shapes of a batch and checksums of the lowered
    programs are compared before. Does nothing if a single process holds the state.

    Args:
      cluster: functions of the workers.
      state: state before the first dispatch.
      context: processes and counters of the run.
      prefetcher: source of the batch; its buffer is filled.
      callbacks: evaluation and saving.
      settings: schedule, weights and numbers of steps.

    Raises:
      CoordinationError: names the entries that differ, or a missing process.
    """
    if not context.is_multi_process:
        return
    prefetcher.fill()
    batch = prefetcher.peek()
    if batch is not None:
        batch = cluster.shard_batch(batch)
    max_steps, weights = settings.max_steps_per_dispatch, settings.weights
    next_round = context.round + 1
    arguments = {
        "schedule": _schedule_fingerprint(settings.schedule, context.step, max_steps),
        "steps": settings.steps,
        "weights": weights and weights.fingerprint(next_round),
        "evaluate_every": callbacks.evaluate_every if callbacks.evaluate else None,
        "save_every": callbacks.save_every if callbacks.save else None,
        "max_steps_per_dispatch": max_steps,
    }
    fingerprint = {
        **{name: str(value) for name, value in arguments.items()},
        "state": {"step": context.step, "round": context.round},
        "leaves": arrays.describe_leaves(state),
        "batch": arrays.describe_leaves(batch),
        "program": _program_checksums(
            cluster, state, batch, weights and weights.example(next_round)
        ),
    }
    assert_equal_across_processes("train()", fingerprint, context.processes)


def upcoming_syncs(schedule: Callable, start: int, count: int) -> list[int]:
    """Returns the synchronisation indices among the next steps.

    Args:
      schedule: predicate on the number of local steps.
      start: local steps done.
      count: number of steps to test.

    Returns:
      The indices in ascending order.

    Example:
      >>> upcoming_syncs(lambda step: step % 4 == 0, 4, 10)
      [8, 12]
    """
    return [step for step in range(start + 1, start + count + 1) if schedule(step)]


def _schedule_fingerprint(
    schedule: Callable, start: int, count: int
) -> Schedule | list[int]:
    """Returns a schedule with a name, or the next synchronisations of a function.

    The `repr` of a function holds its address, which differs between processes.
    """
    if isinstance(schedule, Schedule):
        return schedule
    return upcoming_syncs(schedule, start, count)


def _program_checksums(
    cluster: Cluster, state: State, batch: PyTree, weights: PyTree
) -> dict[str, str]:
    """Returns CRC-32 checksums of the lowered programs; none without a batch."""
    if batch is None:
        return {}
    programs = {
        "local step": (cluster.step, batch),
        "sync": (cluster.sync, weights),
    }
    texts = {
        name: jax.jit(function).lower(state, argument).as_text()
        for name, (function, argument) in programs.items()
    }
    return {
        name: f"checksum {zlib.crc32(text.encode()):08x}"
        for name, text in texts.items()
    }
