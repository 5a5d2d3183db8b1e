"""History of a run: one row of metrics per round, returned as columns."""

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from localsgd_jax.analysis.device_bytes import ByteRange
from localsgd_jax.core.metrics import computed_metrics
from localsgd_jax.core.types import State
from localsgd_jax.training.byte_counter import ByteCounter
from localsgd_jax.training.columns import COLUMNS, DEVICE_BYTES
from localsgd_jax.training.dispatch import DispatchResult
from localsgd_jax.training.evaluation import Evaluation
from localsgd_jax.training.run_context import RunContext

History = dict[str, np.ndarray]


class NonFiniteLossError(FloatingPointError):
    """The loss of a worker is NaN or infinite.

    Attributes:
      step: first local step with a loss that is not finite.
      workers: indices of the workers with such a loss.
      history: columns of all earlier rounds.
      state: state after the last dispatched step.
    """

    def __init__(
        self, step: int, workers: list[int], history: History, state: State
    ) -> None:
        """Initialises the error with a message that names the step and the workers."""
        super().__init__(
            f"train(): the loss is not finite at step {step} for the workers {workers}"
        )
        self.step, self.workers = step, workers
        self.history, self.state = history, state


class HistoryRecorder:
    """Rows of a history, one per round, from the metrics of local steps.

    Attributes:
      step: local steps recorded, counted from step 0.
      round: rounds recorded, counted from round 0.
      rows: a dict of metrics for each round since the run began.
      open_round: metrics of the steps since the last round ended, means over workers.
    """

    def __init__(
        self,
        context: RunContext,
        byte_counter: ByteCounter,
        entry_shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Starts the clock of the column "seconds".

        Args:
          context: counters at the start of the run.
          byte_counter: counter of the columns "bytes" and "device_bytes".
          entry_shapes: columns that exist even without rows, besides `COLUMNS`, with
            the shape of an entry.
        """
        self.step, self.round = context.step, context.round
        self._entry_shapes = dict.fromkeys(COLUMNS, ()) | dict(entry_shapes or {})
        self.rows: list[dict[str, Any]] = []
        self.open_round: list[dict[str, float]] = []
        self._open_objects: list[dict[str, Any]] = []
        self._byte_counter, self._start_time = byte_counter, time.perf_counter()

    def append_steps(self, result: DispatchResult, state: State) -> None:
        """Appends the local steps of a dispatch, and the rows of rounds that it ends.

        Args:
          result: metrics on the host.
          state: state after the last dispatched step, for the error.

        Raises:
          NonFiniteLossError: at the first step with a loss that is not finite.
        """
        for i, ends_round in enumerate(result.due):
            metrics = {name: values[i] for name, values in result.metrics.items()}
            self.step += 1
            if not np.isfinite(losses := metrics.get("loss", np.zeros(1))).all():
                raise self.non_finite_loss(self.step, losses, state)
            self.open_round.append({name: x.mean() for name, x in metrics.items()})
            objects = dict(result.objects)
            self._open_objects.append(jax.tree.map(lambda x, i=i: x[i], objects))
            if ends_round:
                values = {name: x[i] for name, x in result.rule_metrics.items()}
                self.close_round(values, result.device_bytes)

    def close_round(
        self, rule_metrics: Mapping[str, Any], device_bytes: ByteRange | None
    ) -> None:
        """Ends the open round and appends its row.

        Args:
          rule_metrics: metrics of the synchronisation rules at its end, scalars.
          device_bytes: bytes sent by a device in the synchronisation, if known.
        """
        steps, self.open_round = self.open_round, []
        objects, self._open_objects = self._open_objects, []
        means = {name: np.mean([step[name] for step in steps]) for name in steps[0]}
        metrics = {name: float(value) for name, value in means.items()}
        metrics |= computed_metrics(objects)
        metrics |= {name: float(value) for name, value in rule_metrics.items()}
        self.append_round(self.step, metrics, device_bytes)

    def append_round(
        self,
        step: int,
        metrics: Mapping[str, Any],
        device_bytes: ByteRange | None = None,
    ) -> None:
        """Appends the row of a round.

        Args:
          step: local steps at its end.
          metrics: columns besides those that every history has.
          device_bytes: bytes sent by a device in the synchronisation, if known.
        """
        self.step, self.round = step, self.round + 1
        row = {"step": self.step, "round": self.round}
        row |= self._byte_counter.add_round(self.round, device_bytes)
        row["seconds"] = time.perf_counter() - self._start_time
        self.rows.append(row | dict(metrics))

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Adds an evaluation after the last round to its row.

        Args:
          evaluation: its values become columns, its bytes count for that round. A
            value with the name of another column gets the prefix "evaluate.".
        """
        sent = evaluation.bytes, evaluation.device_bytes
        sums = self._byte_counter.add_evaluation(*sent)
        row = self.rows[-1]
        reserved = {*COLUMNS, DEVICE_BYTES, *row}
        values = {
            f"evaluate.{name}" if name in reserved else name: value
            for name, value in evaluation.values.items()
        }
        self.rows[-1] = row | sums | values

    def columns(self) -> History:
        """Returns the rows as columns, with NaN where a row lacks the metric."""
        in_rows = (name for row in self.rows for name in row)
        shapes = dict.fromkeys([*self._entry_shapes, *in_rows], ()) | self._entry_shapes
        return {
            name: np.array([row.get(name, math.nan) for row in self.rows]).reshape(
                len(self.rows), *shape
            )
            for name, shape in shapes.items()
        }

    def non_finite_loss(
        self, step: int, losses: np.ndarray, state: State
    ) -> NonFiniteLossError:
        """Returns the error for losses that are not finite.

        Args:
          step: local step of the losses.
          losses: loss of each worker, `(K,)`.
          state: state after the last dispatched step.

        Returns:
          The error, with the history up to now.
        """
        workers = np.flatnonzero(~np.isfinite(losses)).tolist()
        return NonFiniteLossError(step, workers, self.columns(), state)
