"""Report of a process about a round, gathered together with the synchronisation."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class RoundReport(NamedTuple):
    """Steps, times, flags and metrics of a round, of one or of all live processes.

    Attributes:
      steps: local steps of the round. A number for one process, an array `(N,)` for N
        processes, as all fields.
      compute_seconds: seconds from the previous synchronisation to this one.
      is_done: whether the process has no further steps: 0 or 1.
      stop_requested: whether the process has received SIGTERM: 0 or 1.
      metrics: means over the steps and the workers of the process, by name.
      weight: weight of each worker of the process in the synchronisation.
    """

    steps: Any
    compute_seconds: Any
    is_done: Any
    stop_requested: Any
    metrics: Mapping[str, Any]
    weight: Any = 1.0

    def pack(self) -> np.ndarray:
        """Returns the report as a float32 vector, metrics in the order of their names.

        The weight is the first entry: with `weighted`, the synchronisation takes it
        from there.
        """
        *counters, metrics, weight = self
        values = [metrics[name] for name in sorted(metrics)]
        return np.array([weight, *counters, *values], np.float32)


def unpack(rows: np.ndarray, metric_names: Sequence[str]) -> RoundReport:
    """Returns the reports of several processes as one report with array fields.

    Args:
      rows: `(N, M)`, a packed report per process.
      metric_names: names of the metrics in the reports.

    Returns:
      The report.

    Example:
      >>> report = RoundReport(4, 0.5, 0, 1, {"loss": 2.0})
      >>> unpack(np.stack([report.pack()] * 2), ["loss"]).metrics
      {'loss': array([2., 2.], dtype=float32)}
    """
    weight, steps, seconds, is_done, stop_requested, *values = rows.T
    metrics = dict(zip(sorted(metric_names), values, strict=True))
    return RoundReport(steps, seconds, is_done, stop_requested, metrics, weight)
