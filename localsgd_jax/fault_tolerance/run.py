"""Parts of a fault-tolerant run, and its progress."""

import dataclasses
import math
import threading
from collections.abc import Callable

from localsgd_jax.core.validation import check_int, check_number, check_type
from localsgd_jax.data.prefetch import Prefetcher
from localsgd_jax.execution.process_local import ProcessCluster
from localsgd_jax.fault_tolerance.membership import Membership
from localsgd_jax.fault_tolerance.status import Status
from localsgd_jax.training.callbacks import Callbacks, RowReporter
from localsgd_jax.training.history import HistoryRecorder
from localsgd_jax.training.progress import ProgressBar
from localsgd_jax.training.round_weights import MetricWeights
from localsgd_jax.training.run_context import RunContext


@dataclasses.dataclass(frozen=True)
class RoundLimits:
    """Limits of a round and of the run.

    Attributes:
      schedule: predicate on the number of local steps; where it is true a round ends.
      steps: local steps after which the run ends; None for all batches.
      round_deadline: seconds after which a round ends with fewer local steps, and at
        least one dispatch; None for no deadline.
      min_processes: number of processes below which the run ends.
      weights: weights of the workers by a metric; None for tokens or examples.

    Raises:
      TypeError: if a number has the wrong type.
      ValueError: if a number is out of range.
    """

    schedule: Callable
    steps: int | None
    round_deadline: float | None
    min_processes: int
    weights: MetricWeights | None = None

    def __post_init__(self) -> None:
        """Validates the schedule and the numbers."""
        check_type("train(schedule)", "schedule", self.schedule, Callable)
        if self.steps is not None:
            check_int("train(steps)", "steps", self.steps, 0)
        if self.round_deadline is not None:
            name = "round_deadline"
            check_number(f"train({name})", name, self.round_deadline, above=0)
        check_int("train(min_processes)", "min_processes", self.min_processes, 1)

    def last_step(self, start: int) -> float:
        """Returns the local step after which a run ends that starts at `start`."""
        return math.inf if self.steps is None else start + self.steps


@dataclasses.dataclass(frozen=True)
class Run:
    """Parts of a run that are made once.

    Attributes:
      cluster: functions of the workers.
      membership: live processes.
      context: counters at the start.
      limits: limits of a round and of the run.
      callbacks: evaluation, history rows and saving.
      prefetcher: batches of the workers of this process.
      history: rows of all rounds.
      on_round_end: reports rows in process 0, and counts them in the others.
      schedule_updates: passes rows to an adaptive schedule.
      bar: progress bar, visible in process 0 only.
      stop_requested: is set by SIGTERM.
    """

    cluster: ProcessCluster
    membership: Membership
    context: RunContext
    limits: RoundLimits
    callbacks: Callbacks
    prefetcher: Prefetcher
    history: HistoryRecorder
    on_round_end: RowReporter
    schedule_updates: RowReporter
    bar: ProgressBar
    stop_requested: threading.Event

    @property
    def last_step(self) -> float:
        """Local step after which the run ends."""
        return self.limits.last_step(self.context.step)


@dataclasses.dataclass
class Progress:
    """Values that change from round to round, besides the state and the history.

    Attributes:
      local_step: local steps in the state of this process. `HistoryRecorder.step`
        counts those of the fastest process up to the last synchronisation.
      status: status after the last synchronisation.
      saved_step: step of the last saved state.
      expected_processes: processes that should take part in the next synchronisation.
      round_start: time of the last synchronisation, of a monotonic clock, in seconds.
      metric_names: names of the metrics of a local step.
      batch_size: examples per worker in a batch.
    """

    local_step: int
    status: Status
    saved_step: int
    expected_processes: set[int]
    round_start: float
    metric_names: tuple[str, ...] = ()
    batch_size: int = 0
