"""Periods that follow the run: decided from the history, the same for all workers.

The history holds means over workers, which all processes know, so no worker asks
another and no collective is added. A decision holds for the steps that are not on their
way yet: one dispatch of `train` later.
"""

import bisect
import math
from collections.abc import Callable, Mapping

import jax

from localsgd_jax import checks


class Adaptive:
    """A schedule whose rounds grow or shrink with what a run has seen.

    `train`, of either kind, tells it each row of the history. It asks with Python ints
    only: inside a compiled program the future is not known yet.
    """

    def __init__(self, period: int, decide: Callable, name: str) -> None:
        """Starts with a period.

        Args:
          period: H of the first rounds.
          decide: `decide(row, length) -> period`, from a row of the history and the
            local steps of its round.
          name: the call that made it.
        """
        self.period, self.decide, self.name = period, decide, name
        self.ends, self.told = [0], 0

    def __call__(self, step: int) -> bool:
        """Returns whether workers synchronise after local update `step`."""
        if isinstance(step, jax.core.Tracer):
            raise TypeError(f"{self.name}: it works in train(every=...) only")
        while self.ends[-1] < step:
            self.ends.append(self.ends[-1] + self.period)
        return step > 0 and self.ends[bisect.bisect_left(self.ends, step)] == step

    def learn(self, row: Mapping[str, float], step: int) -> None:
        """Decides on the rounds that begin at `step` or later.

        Args:
          row: of the history.
          step: local updates that are done or on their way.
        """
        self.period = self.decide(row, int(row["step"]) - self.told)
        self.told = int(row["step"])
        self.ends = [end for end in self.ends if end <= step] or [step]

    def __repr__(self) -> str:
        """Returns the call that made this schedule."""
        return self.name


def adacomm(h: int, least: int = 1, factor: float = 0.5) -> Adaptive:
    """Shortens the period as the loss falls.

    With the mean loss F of a round and F₀ of the first:

        H ← max(least, min(⌈√(F/F₀) h⌉, H))      if that is shorter than before
        H ← max(least, ⌊factor · H⌋)              if F has not fallen below its best

    where H on the right is the length of that round.

    Few rounds of communication while any progress is good, many near the end.

    Args:
      h: first period, at least 1.
      least: least period, at least 1.
      factor: shortening where the loss has stopped falling, in (0, 1].

    Returns:
      A schedule for `train`; the metrics need "loss".

    Raises:
      TypeError: if a period is not an int.
      ValueError: if an argument is out of range.

    Example:
      >>> schedule = adacomm(16)
      >>> for step, loss in ((16, 4.0), (32, 1.0)):
      ...     schedule.learn({"step": step, "loss": loss}, step)
      >>> schedule.period
      8

    References:
      Wang, Joshi, Adaptive Communication Strategies to Achieve the Best Error-Runtime
      Trade-off in Local-Update SGD, 2019, equations 17 and 18. arXiv:1810.08313
    """
    h = checks.integer("adacomm(h)", "h", h, 1)
    least = checks.integer("adacomm(least)", "least", least, 1)
    if not 0 < factor <= 1:
        raise ValueError(f"adacomm(factor): it must be in (0, 1], got {factor}")
    losses, periods = [], [h]

    def decide(row: Mapping[str, float], length: int) -> int:
        loss = _column("adacomm()", row, "loss")
        best = min(losses, default=math.inf)
        losses.append(loss)
        ratio = loss / losses[0] if losses[0] > 0 else 0.0
        wanted = math.ceil(math.sqrt(max(ratio, 0.0)) * h)
        if wanted >= length and loss >= best:
            wanted = math.floor(factor * length)
        periods.append(max(least, min(wanted, periods[-1])))
        return periods[-1]

    return Adaptive(h, decide, f"adacomm({h})")


def triggered(
    h: int, threshold: float, longest: int, column: str = "consensus_distance"
) -> Adaptive:
    """Shortens the period when workers drift apart, and lengthens it when they do not.

    With the distance D of the workers at the end of a round of H steps, the next have

        max(1, ⌊H/2⌋)          if D > threshold
        min(longest, 2H)       if D < threshold/2
        H                      otherwise

    Args:
      h: first period, at least 1.
      threshold: positive.
      longest: longest period, at least h.
      column: of the history; "consensus_distance" is what `measured(rule)` notes.

    Returns:
      A schedule for `train`.

    Raises:
      TypeError: if a period is not an int.
      ValueError: if an argument is out of range.

    Example:
      >>> schedule = triggered(8, threshold=1.0, longest=64)
      >>> schedule.learn({"step": 8, "consensus_distance": 3.0}, step=8)
      >>> schedule.period
      4

    References:
      Kamp et al., Efficient Decentralized Deep Learning by Dynamic Model Averaging,
      2018, section 3. arXiv:1807.03210
    """
    h = checks.integer("triggered(h)", "h", h, 1)
    longest = checks.integer("triggered(longest)", "longest", longest, h)
    if not threshold > 0:
        raise ValueError(f"triggered(threshold): it must be positive, got {threshold}")

    def decide(row: Mapping[str, float], length: int) -> int:
        distance = _column("triggered()", row, column)
        if distance > threshold:
            return max(1, length // 2)
        return min(longest, 2 * length) if distance < threshold / 2 else length

    return Adaptive(h, decide, f"triggered({h}, {threshold}, {longest})")


def _column(call: str, row: Mapping[str, float], name: str) -> float:
    """Returns a number of a row; says what the history has if it lacks it."""
    if name not in row:
        raise ValueError(
            f"{call}: the history must have the column {name!r}, got {sorted(row)}"
        )
    return row[name]
