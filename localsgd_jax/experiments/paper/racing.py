"""Racing of step sizes: lazy evaluation of all runs until the best is known."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

EVALUATION_SPACING = 1.04
# An error c times above the target is evaluated again when t has grown by c^(1/4), at
# most by half: errors of good step sizes fall as 1/t, and evaluations take most time.
WAIT_EXPONENT = 1 / 4
MAX_WAIT_FACTOR = 1.5


class HittingTimes(NamedTuple):
    """First steps at which the runs reached ε.

    Attributes:
      step: first evaluated step at which an output had f − f* ≤ ε, infinite if there is
        none, `(R, S)`.
      output: index of that output, `(R, S)`.
      diverged: whether no output was better than the initial point at its last
        evaluation, `(R, S)`.
    """

    step: np.ndarray
    output: np.ndarray
    diverged: np.ndarray


def evaluation_steps(limit: int) -> Iterator[int]:
    """Yields the steps that may be evaluated, about 4 % apart, and the last one.

    Args:
      limit: last step.

    Yields:
      t.

    Example:
      >>> list(evaluation_steps(5)), [t for t in evaluation_steps(120) if t > 100]
      ([1, 2, 3, 4, 5], [104, 108, 112, 116, 120])
    """
    t = 1
    while t < limit:
        yield t
        t = max(t + 1, round(EVALUATION_SPACING * t))
    yield limit


class Race:
    """Lazily evaluated runs; step sizes that can no longer win are eliminated.

    The score of a step size is the mean of its hitting time over R seeds. It is
    eliminated when its smallest possible score is not below the best score.

    Attributes:
      times: steps for which `evaluate` was called.
      evaluated: index into `times` of the last evaluation of each output, or -1,
        `(4, R, S)`.
      error: last evaluated f − f* of each output, `(4, R, S)`.
      step: hitting times, infinite if unknown, `(R, S)`.
      output: output that reached ε, `(R, S)`.
    """

    def __init__(
        self, shape: tuple[int, int, int], target: float, start: float, best: float
    ) -> None:
        """Starts a race.

        Args:
          shape: numbers of outputs, seeds and step sizes, (4, R, S).
          target: ε.
          start: f(x₀) − f*.
          best: score to beat, or infinite.
        """
        self.target, self.start, self._score_to_beat = target, start, best
        self.times: list[int] = []
        self._pending_points: dict[int, jax.Array] = {}
        self.evaluated = np.full(shape, -1)
        self._next_evaluation = np.zeros(shape)
        self.error = np.full(shape, start)
        self.step = np.full(shape[1:], np.inf)
        self.output = np.zeros(shape[1:], int)

    def evaluate(
        self, t: int, points: jax.Array, errors_of: Callable, last: bool = False
    ) -> None:
        """Adds the outputs after t steps and evaluates the outputs that are due.

        Args:
          t: number of steps.
          points: the outputs, `(4, R, S, d)`.
          errors_of: function from points `(m, d)` to f − f* `(m,)`.
          last: whether t is the last step, at which all outputs are evaluated.
        """
        now = len(self.times)
        self.times.append(t)
        self._pending_points[now] = points
        while (selected := self._select(now, last)).any():
            self._evaluate(now, selected, errors_of)
        self._release()

    def active(self) -> np.ndarray:
        """Returns which step sizes may still become the best, bool `(S,)`."""
        return self._lower_bound().mean(axis=0) < self.best()

    def best(self) -> float:
        """Returns the smallest score so far, infinite if there is none."""
        return min(self._score_to_beat, self.step.mean(axis=0).min())

    def hitting_times(self) -> HittingTimes:
        """Returns the result."""
        diverged = np.all(self.error >= self.start, axis=0)
        return HittingTimes(self.step, self.output, diverged)

    def _select(self, now: int, last: bool) -> np.ndarray:
        """Returns the outputs to evaluate: due ones, and all after the best score.

        An output that was last evaluated before the best score may have reached ε
        before it.
        """
        t = self.times[now]
        open_outputs = self.active() & np.isinf(self.step) & (self.evaluated < now)
        return open_outputs & (last | (self._next_evaluation <= t) | (t >= self.best()))

    def _lower_bound(self) -> np.ndarray:
        """Returns the smallest possible hitting time of each run, `(R, S)`."""
        times = np.array([*self.times, self.times[-1] + 1 if self.times else 1])
        earliest = times[self.evaluated.min(axis=0) + 1]
        return np.where(np.isinf(self.step), earliest, self.step)

    def _evaluate(self, now: int, selected: np.ndarray, errors_of: Callable) -> None:
        """Evaluates outputs; after a hit, also the skipped steps of the run."""
        error = self._errors(now, selected, errors_of)
        self.error[selected] = error
        hit = np.zeros_like(selected)
        hit[selected] = error <= self.target
        runs = np.any(hit, axis=0)
        previous = self.evaluated.copy()
        self.evaluated[selected] = now
        with np.errstate(over="ignore"):
            factor = (error / self.target) ** WAIT_EXPONENT
        wait = np.minimum(factor, MAX_WAIT_FACTOR)
        self._next_evaluation[selected] = self.times[now] * wait
        if runs.any():
            self._backfill(previous, now, runs, errors_of)

    def _backfill(
        self, previous: np.ndarray, now: int, runs: np.ndarray, errors_of: Callable
    ) -> None:
        """Finds the first step at which an output of these runs had reached ε."""
        for i in range(previous[:, runs].min() + 1, now + 1):
            selected = (previous < i) & runs & np.isinf(self.step)
            if not selected.any():
                continue
            error = np.full(selected.shape, np.inf)
            error[selected] = self._errors(i, selected, errors_of)
            new = (error <= self.target).any(axis=0)
            self.step[new] = self.times[i]
            self.output[new] = error.argmin(axis=0)[new]

    def _errors(self, i: int, selected: np.ndarray, errors_of: Callable) -> np.ndarray:
        """Returns the errors of some outputs at step `times[i]`."""
        return errors_of(np.asarray(self._pending_points[i])[selected])

    def _release(self) -> None:
        """Frees the outputs that have been evaluated in all active runs."""
        open_runs = self.active() & np.isinf(self.step)
        if open_runs.any():
            oldest = self.evaluated[:, open_runs].min()
        else:
            oldest = len(self.times)
        for i in [i for i in self._pending_points if i <= oldest]:
            del self._pending_points[i]
