"""Fault-tolerant training loop: process-local rounds, and retried synchronisations."""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from localsgd_jax.core.types import PyTree, State
from localsgd_jax.core.validation import check_number, check_state, check_type
from localsgd_jax.data.prefetch import Prefetcher
from localsgd_jax.execution.process_local import ProcessCluster
from localsgd_jax.fault_tolerance.consistency import assert_equal_runs
from localsgd_jax.fault_tolerance.history import entry_shapes
from localsgd_jax.fault_tolerance.membership import Membership
from localsgd_jax.fault_tolerance.rounds import (
    complete_sync,
    run_local_round,
    start_sync,
)
from localsgd_jax.fault_tolerance.run import Progress, RoundLimits, Run
from localsgd_jax.fault_tolerance.status import Status
from localsgd_jax.schedules.adaptive import AdaptiveSchedule
from localsgd_jax.training.byte_counter import ByteCounter
from localsgd_jax.training.callbacks import Callbacks, RowReporter
from localsgd_jax.training.history import History, HistoryRecorder
from localsgd_jax.training.progress import ProgressBar, progress_bar
from localsgd_jax.training.round_weights import MetricWeights, weighted_by
from localsgd_jax.training.run_context import RunContext, train_schedule


def train(
    cluster: ProcessCluster,
    state: State,
    batches: Iterable[PyTree],
    *,
    schedule: int | Callable,
    steps: int | None = None,
    round_deadline: float | None = None,
    weights: str | MetricWeights | None = None,
    overlap: bool = False,
    evaluate: Callable | None = None,
    evaluate_every: int = 1,
    eval_fields: str | Sequence[str] | None = "params",
    on_round_end: Callable | None = None,
    save: Callable | None = None,
    save_every: int = 1000,
    progress: bool | None = None,
    min_processes: int = 1,
    sync_timeout: float = 60.0,
    straggler_timeout: float = 600.0,
) -> tuple[State, History]:
    """Trains as `localsgd_jax.train` does, and continues when processes fail.

    A process takes its local steps in a process-local program, which the failure of
    another process cannot interrupt. Then the live processes synchronise:

        xₖ ← rule(xⱼ of the live processes)

    If one fails before or during that, the others repeat it without the failed one,
    from their own local states. Process 0 hosts the coordination service: if it fails,
    all processes end, and the job has to be restarted (`localsgd launch --elastic
    --restarts n`).

    SIGTERM to a process other than 0 ends it with exit code 143 after one more
    synchronisation, so that its progress is kept. SIGTERM to process 0 ends all
    processes in this way, after a checkpoint.

    Args:
      cluster: from `on_processes`.
      state: from `cluster.init` or `cluster.replicate`.
      batches: iterable of batches with rows for all K workers, of which a process takes
        its own, or only with the rows of its workers.
      schedule: a period, or a schedule: a predicate on the number of local steps.
      steps: most local steps of this call; None for all batches.
      round_deadline: seconds. A process whose round has lasted that long ends it with
        the local steps that it has taken, at least one. None: all workers take
        equally many.
      weights: name of a metric, such as "tokens", whose sum over the local steps of the
        round is the weight of a worker, or `weighted_by(metric, formula)`; the workers
        of a process have the mean of their sums. "examples" also stands for the rows of
        the batches, so that processes may have batches of different sizes. None: the
        metric "tokens" if there is one, else "examples".
      overlap: whether the next round is computed while the synchronisation is in
        flight, as with the rule `overlap`.
      evaluate: as in `localsgd_jax.train`. Given in all processes, which compute the
        mean model together, and called in process 0.
      evaluate_every: rounds with a multiple of this number are evaluated, and the last.
      eval_fields: as in `localsgd_jax.train`.
      on_round_end: called in process 0 with each row of the history.
      save: `save(state, examples)`, given in all processes and called in process 0. The
        state is that of one worker, the mean of all (`cluster.mean_cluster` is its
        cluster); `examples` counts the examples of all workers since the call of
        `train` began.
      save_every: number of local steps after which the end of the next round is saved;
        the end of the run is saved, too.
      progress: whether process 0 shows a progress bar; None: if tqdm is installed.
      min_processes: with fewer live processes all end with exit code 75, after a
        checkpoint.
      sync_timeout: seconds that a synchronisation may take once all live processes have
        arrived.
      straggler_timeout: seconds to wait for a process that is live and does not arrive.

    Returns:
      The synchronised state, and the history of `localsgd_jax.train`, in which "step"
      counts the steps of the fastest process, with further columns:

      - "live_processes": number of live processes;
      - "straggler": the process that the others waited for;
      - "sync_seconds": duration of the synchronisation in this process, without
        waiting;
      - "compute_seconds", "wait_seconds" and "steps", with an entry per process, NaN
        for failed ones: seconds from the previous synchronisation to this one, seconds
        at the barrier until the straggler arrived, and local steps of the round.

    Raises:
      MembershipError: if the live processes cannot continue; in the other processes, if
        `evaluate`, `on_round_end` or `save` raises in process 0.
      CoordinationError: before the first step, if processes have different arguments.
      NonFiniteLossError: in all processes, if the mean of the metric "loss" over a
        round of a process is not finite; it names all workers of that process.
      SystemExit: with code 143 or 75, see above.
      ValueError: if an argument is out of range, or there is no batch.
      TypeError: if an argument has the wrong type.
    """
    check_type("train(cluster)", "cluster", cluster, ProcessCluster)
    check_state("train(state)", state)
    check_type("train(batches)", "batches", batches, Iterable)
    check_type("train(overlap)", "overlap", overlap, bool)
    check_type("train(progress)", "progress", progress, bool, type(None))
    weight_types = str, MetricWeights, type(None)
    check_type("train(weights)", "weights", weights, *weight_types)
    callbacks = Callbacks(
        evaluate, evaluate_every, eval_fields, on_round_end, save, save_every
    )
    weights = weighted_by(weights) if isinstance(weights, str) else weights
    schedule = train_schedule(schedule)
    limits = RoundLimits(schedule, steps, round_deadline, min_processes, weights)
    timeouts = {"sync_timeout": sync_timeout, "straggler_timeout": straggler_timeout}
    for name, seconds in timeouts.items():
        check_number(f"train({name})", name, seconds, above=0)
    membership = Membership(cluster.devices, sync_timeout, straggler_timeout)
    if min_processes > (count := len(membership.processes)):
        raise ValueError(
            f"train(min_processes): there are {count} processes, got {min_processes}"
        )
    assert_equal_runs(state, limits, overlap, callbacks, membership.processes)
    show_bar = membership.process_index == 0 and progress
    with (
        _sigterm_event() as stop_requested,
        progress_bar(show_bar, steps, batches) as bar,
    ):
        run = _make_run(
            cluster, state, batches, membership, limits, callbacks, stop_requested, bar
        )
        state, status = _run_rounds(run, state, overlap)
        # Raises in all processes if the last callbacks of process 0 have raised.
        membership.run_atomically(lambda devices: None)
    if status.exit_code:
        raise SystemExit(status.exit_code)
    return state, run.history.columns()


def _run_rounds(run: Run, state: State, overlap: bool) -> tuple[State, Status]:
    """Alternates local rounds and synchronisations until the run ends."""
    start, pending = run.context.step, None
    progress = Progress(
        local_step=start,
        status=Status.RUNNING if start < run.last_step else Status.DONE,
        saved_step=start,
        expected_processes=set(run.membership.processes),
        round_start=time.monotonic(),
    )
    while progress.status is Status.RUNNING:
        state, report = run_local_round(run, progress, state)
        if pending:
            state, reports = complete_sync(run, progress, pending, state)
            if reports.is_done.all():
                # No process has taken further steps, so there is nothing to add.
                break
        pending = start_sync(run, progress, state, report)
        if progress.status is not Status.RUNNING or not overlap:
            state, _ = complete_sync(run, progress, pending, state)
            pending = None
    return state, progress.status


def _make_run(
    cluster: ProcessCluster,
    state: State,
    batches: Iterable[PyTree],
    membership: Membership,
    limits: RoundLimits,
    callbacks: Callbacks,
    stop_requested: threading.Event,
    bar: ProgressBar,
) -> Run:
    """Makes the parts of a run."""
    is_primary = membership.process_index == 0
    context = RunContext(
        membership.processes, is_primary, int(state.step), int(state.round)
    )
    rows = cluster.local.num_workers
    local_batches = (_local_rows(cluster, batch) for batch in batches)
    schedule = limits.schedule
    is_adaptive = isinstance(schedule, AdaptiveSchedule)
    return Run(
        cluster=cluster,
        membership=membership,
        context=context,
        limits=limits,
        callbacks=callbacks,
        prefetcher=Prefetcher(local_batches, cluster.local.shard_batch, (rows, rows)),
        history=HistoryRecorder(
            context,
            ByteCounter(cluster.bytes_sent, state),
            entry_shapes(len(membership.processes)),
        ),
        on_round_end=RowReporter(callbacks.on_round_end if is_primary else None),
        schedule_updates=RowReporter(schedule.update if is_adaptive else None),
        bar=bar,
        stop_requested=stop_requested,
    )


def _local_rows(cluster: ProcessCluster, batch: PyTree) -> PyTree:
    """Returns the rows of the workers of this process, if a batch has all K rows."""
    leading = [np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)[:1]]
    if leading != [(cluster.num_workers,)]:
        return batch
    first = cluster.first_local_worker
    rows = slice(first, first + cluster.local.num_workers)
    return jax.tree.map(lambda x: x[rows], batch)


@contextmanager
def _sigterm_event() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM sets; outside the main thread it is never set."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(*signal_and_frame: Any) -> None:
        event.set()

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, previous)
