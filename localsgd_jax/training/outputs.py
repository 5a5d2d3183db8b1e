"""Outputs of a run: history rows, evaluation, `on_round_end` and progress."""

from collections.abc import Callable, Iterable

from localsgd_jax.core.types import State
from localsgd_jax.schedules.adaptive import AdaptiveSchedule
from localsgd_jax.training.callbacks import Callbacks, RowReporter
from localsgd_jax.training.dispatch import DispatchResult
from localsgd_jax.training.evaluation import Evaluator
from localsgd_jax.training.history import HistoryRecorder, NonFiniteLossError
from localsgd_jax.training.progress import ProgressBar
from localsgd_jax.training.run_context import RunContext
from localsgd_jax.training.weight_check import WeightCheck


class RunOutputs:
    """Recording of dispatch results, and evaluation and reporting of history rows.

    The last row is reported after its evaluation, or when the next round has ended.
    """

    def __init__(
        self,
        context: RunContext,
        callbacks: Callbacks,
        evaluator: Evaluator,
        schedule: Callable,
        history: HistoryRecorder,
        weight_check: WeightCheck,
        bar: ProgressBar,
    ) -> None:
        """Connects the history with callbacks, schedule and progress bar.

        Args:
          context: processes of the run; the primary one reports rows.
          callbacks: `evaluate` and `on_round_end`.
          evaluator: evaluation of the mean model.
          schedule: an adaptive schedule is updated with the rows.
          history: rows of the run.
          weight_check: check of the weights of each round.
          bar: progress bar.
        """
        self._callbacks, self._evaluator = callbacks, evaluator
        self._history, self._weight_check, self._bar = history, weight_check, bar
        self._on_round_end = RowReporter(
            callbacks.on_round_end if context.is_primary else None
        )
        is_adaptive = isinstance(schedule, AdaptiveSchedule)
        self._schedule = RowReporter(schedule.update if is_adaptive else None)

    def record(self, results: Iterable[DispatchResult], state: State) -> None:
        """Appends the steps of dispatches to the history.

        Args:
          results: metrics on the host, oldest first.
          state: state after the last dispatched step.

        Raises:
          NonFiniteLossError: if a loss is not finite; rows before it are reported.
          ValueError: if a weight by a metric is out of range; all rows are reported.
        """
        rows = self._history.rows
        try:
            for result in results:
                self._history.append_steps(result, state)
                self._weight_check.append_steps(result)
                self._bar.update(len(result.due), rows)
        except (NonFiniteLossError, ValueError):
            self._on_round_end.report(rows)
            raise
        self._on_round_end.report(rows[:-1])

    def check_open_round(self) -> None:
        """Checks the weights of the last round, which its steps do not close.

        Raises:
          ValueError: if a weight by a metric is out of range; all rows are reported.
        """
        try:
            self._weight_check.close_round()
        except ValueError:
            self._on_round_end.report(self._history.rows)
            raise

    def update_schedule(self, step: int) -> None:
        """Updates an adaptive schedule with the rows since its last update.

        Args:
          step: number of local steps dispatched.
        """
        self._schedule.report(self._history.rows, step)

    def evaluate(self, state: State) -> None:
        """Evaluates the mean model at the end of the last round, once.

        Args:
          state: state after that round.
        """
        rows = self._history.rows
        self._on_round_end.report(rows[:-1])
        if self._callbacks.evaluate and len(rows) > self._on_round_end.num_reported:
            self._history.add_evaluation(self._evaluator.evaluate(state))
        self._on_round_end.report(rows)
