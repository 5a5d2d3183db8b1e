"""Round of a fault-tolerant run: local steps of a process, and a synchronisation."""

import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax
import numpy as np

from localsgd_jax.core.metrics import metrics_by_name, rule_metrics
from localsgd_jax.core.predicates import checked_predicate
from localsgd_jax.core.types import PyTree, State
from localsgd_jax.core.validation import check, check_number
from localsgd_jax.distributed.background import submit_daemon
from localsgd_jax.execution.process_local import merge_late_sync
from localsgd_jax.fault_tolerance.history import (
    PER_PROCESS_COLUMNS,
    SCALAR_COLUMNS,
    check_finite,
    round_columns,
)
from localsgd_jax.fault_tolerance.mean_callbacks import run_callbacks
from localsgd_jax.fault_tolerance.report import RoundReport, unpack
from localsgd_jax.fault_tolerance.run import Progress, Run
from localsgd_jax.fault_tolerance.status import (
    Status,
    next_status,
    stopping_processes,
)
from localsgd_jax.training.columns import check_column_names
from localsgd_jax.training.round_weights import MetricWeights, count_metric

CHUNKS_PER_ROUND = 8
MAX_STEPS_PER_DISPATCH = 64


class PendingSync(NamedTuple):
    """Synchronisation in flight.

    Attributes:
      snapshot: the state that is synchronised.
      local_step: local steps in it.
      future: `(state, reports, seconds)`: the synchronised state, the packed reports of
        all live processes and the duration in this process.
    """

    snapshot: State
    local_step: int
    future: Future


def run_local_round(
    run: Run, progress: Progress, state: State
) -> tuple[State, RoundReport]:
    """Takes the local steps of a round in this process.

    The round ends where the schedule or the run does, with the batches, after
    `round_deadline`, or after SIGTERM. With a deadline, a dispatch has an eighth of the
    steps of the round, so that the clock is read in between.

    Args:
      run: parts of the run.
      progress: `local_step`, `metric_names` and `batch_size` are updated.
      state: state before the round.

    Returns:
      The state after the round, and the report for the other processes.

    Raises:
      ValueError: if the run has no batch at all.
    """
    length = steps_until_sync(run.limits.schedule, progress.local_step, run.last_step)
    has_deadline = run.limits.round_deadline is not None
    chunk = math.ceil(length / CHUNKS_PER_ROUND) if has_deadline else length
    chunk = max(1, min(chunk, MAX_STEPS_PER_DISPATCH))
    steps, examples, means = 0, 0, []
    while steps < length and (num_ready := run.prefetcher.fill(chunk)):
        count = min(chunk, length - steps, num_ready)
        batches = run.prefetcher.next_batches(count)
        state, metrics = run.cluster.local_steps(state, batches)
        means.append((count, _mean_metrics(metrics, state)))
        progress.batch_size = math.prod(np.shape(jax.tree.leaves(batches)[0])[2:3])
        steps, examples = steps + count, examples + count * progress.batch_size
        if run.stop_requested.is_set() or _deadline_passed(run, progress):
            break
    progress.local_step += steps
    report = _make_report(run, progress, steps, means)
    weight = _round_weight(run.limits.weights, report, examples)
    return state, report._replace(weight=weight)


def start_sync(
    run: Run, progress: Progress, state: State, report: RoundReport
) -> PendingSync:
    """Starts the synchronisation of the live processes in the background.

    Args:
      run: parts of the run.
      progress: local steps in the state.
      state: state after the local steps.
      report: report of this process.

    Returns:
      The synchronisation in flight.
    """
    packed = report.pack()

    def sync(devices: list) -> tuple[State, np.ndarray]:
        return run.cluster.sync(state, packed, devices, weighted=True)

    def timed_sync() -> tuple[State, np.ndarray, float]:
        start = time.monotonic()
        synced, reports = run.membership.run_atomically(sync)
        return synced, reports, time.monotonic() - start

    return PendingSync(state, progress.local_step, submit_daemon(timed_sync))


def complete_sync(
    run: Run, progress: Progress, pending: PendingSync, current: State
) -> tuple[State, RoundReport]:
    """Waits for a synchronisation, merges later local steps and records the round.

    Args:
      run: parts of the run.
      progress: is updated, except for the fields about local steps.
      pending: from `start_sync`.
      current: the snapshot of `pending`, or the state after further local steps.

    Returns:
      The merged state, and the reports of all live processes.

    Raises:
      SystemExit: with code 143, if this process has received SIGTERM and the others
        continue.
    """
    synced, packed, seconds = pending.future.result()
    if current is not pending.snapshot:
        synced = merge_late_sync(synced, current, pending.snapshot)
    live = list(run.membership.live)
    reports = unpack(packed, progress.metric_names)
    step = run.history.step + int(reports.steps.max())
    progress.local_step = step + progress.local_step - pending.local_step
    counter = jax.device_put(np.int32(progress.local_step), synced.step.sharding)
    state = synced._replace(step=counter)
    if reports.steps.any():
        _record_round(run, live, reports, step, seconds, state)
        run.schedule_updates.report(run.history.rows, progress.local_step)
    _log_membership(run, progress, live, reports)
    if progress.status is Status.RUNNING:
        progress.status = next_status(
            live, reports, run.membership.process_index, run.limits.min_processes
        )
    if progress.status is Status.LEAVING:
        raise SystemExit(progress.status.exit_code)
    run_callbacks(run, progress, state)
    progress.round_start = time.monotonic()
    return state, reports


def steps_until_sync(schedule: Callable, step: int, last_step: float) -> int:
    """Returns the number of local steps until the round or the run ends.

    Args:
      schedule: predicate on the number of local steps.
      step: local steps done.
      last_step: local steps after which the run ends, perhaps infinite.

    Returns:
      The number of steps; 0 at the end of the run.

    Example:
      >>> steps_until_sync(lambda step: step % 4 == 0, 5, 100)
      3
      >>> steps_until_sync(lambda step: step % 4 == 0, 5, 6)
      1
    """
    schedule = checked_predicate("train(schedule)", schedule)
    remaining = max(last_step - step, 0)
    steps = itertools.takewhile(lambda i: i < remaining, itertools.count(1))
    return int(next((i for i in steps if schedule(step + i)), remaining))


def _record_round(
    run: Run,
    live: Sequence[int],
    reports: RoundReport,
    step: int,
    seconds: float,
    state: State,
) -> None:
    """Appends the row of a round; raises if a loss is not finite."""
    history, membership = run.history, run.membership
    columns = round_columns(
        membership.processes, live, membership.process_index, reports, seconds
    )
    loss = columns.get("loss", 0.0)
    check_finite(history, run.cluster, live, reports, step, loss, state)
    columns |= {name: float(x) for name, x in rule_metrics(state).items()}
    new_steps = step - history.step
    history.append_round(step, columns)
    run.bar.update(new_steps, history.rows)


def _make_report(
    run: Run, progress: Progress, steps: int, means: list[tuple[int, dict]]
) -> RoundReport:
    """Returns the report of this process about its local steps."""
    if progress.local_step <= run.context.step:
        raise ValueError("train(batches): the iterator is empty")
    if means:
        progress.metric_names = tuple(means[0][1])
    metrics = {
        name: sum(count * values[name] for count, values in means) / max(steps, 1)
        for name in progress.metric_names
    }
    is_done = progress.local_step >= run.last_step or run.prefetcher.is_exhausted()
    seconds = time.monotonic() - progress.round_start
    return RoundReport(steps, seconds, is_done, run.stop_requested.is_set(), metrics)


def _round_weight(
    weights: MetricWeights | None, report: RoundReport, examples: int
) -> float:
    """Returns the weight of the workers of this process in a round.

    Args:
      weights: weights by a metric; None for the metric "tokens" or "examples".
      report: steps and metrics of the round.
      examples: rows of the batches of one worker, for a training step without the
        metric "examples".

    Returns:
      The weight; 0 for a round without steps.

    Raises:
      ValueError: if there is no such metric, or the weight is out of range.
    """
    if not report.steps:
        return 0.0
    metrics = {"examples": examples / report.steps, **report.metrics}
    weights = weights or MetricWeights(count_metric(report.metrics) or "examples")
    text = f"{weights.metric!r} must be a metric with one number per worker"
    check(weights.metric in metrics, "train(weights)", text, sorted(metrics))
    value = weights(metrics[weights.metric] * report.steps, report.steps)
    call = f"train(weights): {weights}"
    return float(check_number(call, "a weight", value, at_least=0, at_most=1e20))


def _mean_metrics(metrics: PyTree, state: State) -> dict[str, float]:
    """Averages the metrics with one number per step and worker; waits for them.

    Raises a ValueError if one has the name of another column.
    """
    named = metrics_by_name(metrics, ndim=2)
    own = (*SCALAR_COLUMNS, *PER_PROCESS_COLUMNS)
    check_column_names("train(): metrics", named, [*own, *rule_metrics(state)])
    check_column_names("train(): metrics of rules", rule_metrics(state), own)
    return {name: float(np.mean(np.asarray(values))) for name, values in named.items()}


def _deadline_passed(run: Run, progress: Progress) -> bool:
    """Returns whether the round has reached its deadline."""
    deadline = run.limits.round_deadline
    elapsed = time.monotonic() - progress.round_start
    return deadline is not None and elapsed >= deadline


def _log_membership(
    run: Run, progress: Progress, live: Sequence[int], reports: RoundReport
) -> None:
    """Prints in process 0 the processes that have failed or are about to leave."""
    stopping = stopping_processes(live, reports)
    lost = progress.expected_processes - set(live)
    progress.expected_processes = set(live) - set(stopping)
    events = [f"lost process {p} (failed or heartbeat timeout)" for p in sorted(lost)]
    events += [f"process {p} leaves (SIGTERM)" for p in stopping]
    if run.context.is_primary:
        for event in events:
            text = f"train(): step {run.history.step}: {event}"
            print(text, file=sys.stderr, flush=True)
