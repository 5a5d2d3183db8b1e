"""Adaptive synchronisation schedules: the period is updated from the training history.

The history holds means over all workers, which every process has, so an update needs no
collective. It applies to steps that are not dispatched yet: in `train`, one dispatch
later.
"""

import bisect
import math
from collections.abc import Callable, Mapping

from localsgd_jax.core.pytrees import is_traced
from localsgd_jax.core.validation import check_int, check_number, check_type


class AdaptiveSchedule:
    """Schedule with a period that is updated from the training history.

    Both training loops call `update` with each row of the history. The schedule accepts
    Python ints only: it cannot be traced, as the period is updated on the host between
    dispatches.

    Attributes:
      period: H of the rounds that start from now on.
      next_period: `next_period(row, length) -> period`, the update function.
      name: the call that made the schedule.
      round_ends: ends of the rounds computed so far, in local steps; `update` removes
        those after `step`.
      last_step: step of the last row of the history.
    """

    def __init__(
        self,
        period: int,
        next_period: Callable[[Mapping[str, float], int], int],
        name: str,
    ) -> None:
        """Initialises a schedule with the period of its first rounds.

        Args:
          period: H of the first rounds.
          next_period: `next_period(row, length) -> period`, from a row of the history
            and the number of local steps of its round.
          name: the call that made the schedule.

        Raises:
          TypeError: if an argument has the wrong type.
          ValueError: if the period is below 1.
        """
        call = "AdaptiveSchedule"
        check_type(f"{call}(next_period)", "next_period", next_period, Callable)
        check_type(f"{call}(name)", "name", name, str)
        self.period = check_int(f"{call}(period)", "period", period, 1)
        self.next_period, self.name = next_period, name
        self.round_ends, self.last_step = [0], 0

    def __call__(self, step: int) -> bool:
        """Returns whether workers synchronise after local step `step`."""
        if is_traced(step):
            raise TypeError(
                f"{self.name}: an adaptive schedule cannot be traced; pass it to "
                f"train(schedule=...), got {step!r}"
            )
        while self.round_ends[-1] < step:
            self.round_ends.append(self.round_ends[-1] + self.period)
        return (
            step > 0
            and self.round_ends[bisect.bisect_left(self.round_ends, step)] == step
        )

    def update(self, row: Mapping[str, float], step: int) -> None:
        """Updates the period of the rounds that start at `step` or later.

        Args:
          row: a row of the history.
          step: number of local steps that are done or dispatched.
        """
        self.period = self.next_period(row, int(row["step"]) - self.last_step)
        self.last_step = int(row["step"])
        self.round_ends = [end for end in self.round_ends if end <= step] or [step]

    def __repr__(self) -> str:
        """Returns the call that made this schedule."""
        return self.name


def adacomm(h: int, min_period: int = 1, factor: float = 0.5) -> AdaptiveSchedule:
    """Shortens the period as the loss falls (AdaComm).

    With the mean loss F of a round and F₀ of the first:

        H ← max(min_period, min(⌈√(F/F₀) h⌉, H))    if that is shorter than before
        H ← max(min_period, ⌊factor · H⌋)            if F has not fallen below its best

    where H on the right is the length of that round.

    Workers communicate rarely while the loss is large and often near the end.

    Args:
      h: first period, at least 1.
      min_period: smallest period, at least 1.
      factor: factor of the period when the loss has stopped falling, in (0, 1].

    Returns:
      A schedule for `train`; the metrics need "loss".

    Raises:
      TypeError: if a period is not an int.
      ValueError: if an argument is out of range.

    Example:
      >>> schedule = adacomm(16)
      >>> for step, loss in ((16, 4.0), (32, 1.0)):
      ...     schedule.update({"step": step, "loss": loss}, step)
      >>> schedule.period
      8

    References:
      Wang, Joshi, Adaptive Communication Strategies to Achieve the Best Error-Runtime
      Trade-off in Local-Update SGD, 2019, equations 17 and 18. arXiv:1810.08313
    """
    h = check_int("adacomm(h)", "h", h, 1)
    min_period = check_int("adacomm(min_period)", "min_period", min_period, 1)
    factor = float(
        check_number("adacomm(factor)", "factor", factor, above=0, at_most=1)
    )
    losses, periods = [], [h]

    def next_period(row: Mapping[str, float], length: int) -> int:
        loss = _read_metric("adacomm()", row, "loss")
        best = min(losses, default=math.inf)
        losses.append(loss)
        ratio = loss / losses[0] if losses[0] > 0 else 0.0
        period = math.ceil(math.sqrt(max(ratio, 0.0)) * h)
        if period >= length and loss >= best:
            period = math.floor(factor * length)
        periods.append(max(min_period, min(period, periods[-1])))
        return periods[-1]

    return AdaptiveSchedule(h, next_period, f"adacomm({h})")


def drift_triggered(
    h: int, threshold: float, max_period: int, column: str = "consensus_distance"
) -> AdaptiveSchedule:
    """Adapts the period to the drift of workers.

    With the distance D of the workers at the end of a round of H steps, the next has

        max(1, ⌊H/2⌋)          if D > threshold
        min(max_period, 2H)    if D < threshold/2
        H                      otherwise

    Args:
      h: first period, at least 1.
      threshold: positive.
      max_period: largest period, at least h.
      column: column of the history that holds D; the default is a metric of
        `with_diagnostics(rule)`.

    Returns:
      A schedule for `train`.

    Raises:
      TypeError: if a period is not an int.
      ValueError: if an argument is out of range.

    Example:
      >>> schedule = drift_triggered(8, threshold=1.0, max_period=64)
      >>> schedule.update({"step": 8, "consensus_distance": 3.0}, step=8)
      >>> schedule.period
      4

    References:
      Kamp et al., Efficient Decentralized Deep Learning by Dynamic Model Averaging,
      2018, section 3. arXiv:1807.03210
    """
    call = "drift_triggered"
    h = check_int(f"{call}(h)", "h", h, 1)
    max_period = check_int(f"{call}(max_period)", "max_period", max_period, h)
    check_number(f"{call}(threshold)", "threshold", threshold, above=0)
    check_type(f"{call}(column)", "column", column, str)

    def next_period(row: Mapping[str, float], length: int) -> int:
        distance = _read_metric(f"{call}()", row, column)
        if distance > threshold:
            return max(1, length // 2)
        return min(max_period, 2 * length) if distance < threshold / 2 else length

    name = f"{call}({h}, {threshold}, {max_period})"
    return AdaptiveSchedule(h, next_period, name)


def _read_metric(call: str, row: Mapping[str, float], name: str) -> float:
    """Returns a metric of a history row; raises if it is missing."""
    if name not in row:
        raise ValueError(
            f"{call}: the history must have the column {name!r}, got {sorted(row)}"
        )
    return row[name]
