"""Which step size reaches ε first, and when."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

SPACING = 1.04
# An error c times too large is looked at again when t has grown by c^(1/4), at most
# by half: errors fall as 1/t for the good step sizes, and looking is what costs time.
PATIENCE = 1 / 4
LONGEST_WAIT = 1.5


class Arrival(NamedTuple):
    """When each run reached ε.

    Attributes:
      step: first step looked at where an output had f − f* ≤ ε, infinite if none,
        `(R, S)`.
      output: which output it was, `(R, S)`.
      hopeless: whether every output was no better than the start when it was looked
        at last, `(R, S)`.
    """

    step: np.ndarray
    output: np.ndarray
    hopeless: np.ndarray


def looks(limit: int) -> Iterator[int]:
    """Yields the steps at which to look, about 4 % apart, and the limit.

    Args:
      limit: the last one.

    Yields:
      t.

    Example:
      >>> list(looks(5)), [t for t in looks(120) if t > 100]
      ([1, 2, 3, 4, 5], [104, 108, 112, 116, 120])
    """
    t = 1
    while t < limit:
        yield t
        t = max(t + 1, round(SPACING * t))
    yield limit


class Race:
    """Looks at the outputs of all runs as seldom as the result allows.

    A step size counts with the mean over its R seeds. It leaves the race when even
    arriving at the next look could not make it the best.
    """

    def __init__(
        self, shape: tuple[int, int, int], target: float, start: float, best: float
    ) -> None:
        """Starts a race.

        Args:
          shape: numbers of outputs, seeds and step sizes, (4, R, S).
          target: ε.
          start: f(x₀) − f*.
          best: mean to be beaten, or infinite.
        """
        self.target, self.start, self.given = target, start, best
        self.times, self.held = [], {}
        self.looked = np.full(shape, -1)
        self.due = np.zeros(shape)
        self.error = np.full(shape, start)
        self.step = np.full(shape[1:], np.inf)
        self.output = np.zeros(shape[1:], int)

    def look(
        self, t: int, points: jax.Array, errors_of: Callable, last: bool = False
    ) -> None:
        """Takes the outputs `(4, R, S, d)` after t steps; evaluates those due.

        Args:
          t: steps done.
          points: the outputs.
          errors_of: from points `(m, d)` to f − f* `(m,)`.
          last: whether all must be looked at, since no look follows.
        """
        now = len(self.times)
        self.times.append(t)
        self.held[now] = points
        while (chosen := self._chosen(now, last)).any():
            self._evaluate(now, chosen, errors_of)
        self._forget()

    def racing(self) -> np.ndarray:
        """Returns which step sizes may still become the best, bool `(S,)`."""
        return self._earliest().mean(axis=0) < self.best()

    def best(self) -> float:
        """Returns the least mean over seeds so far, infinite if there is none."""
        return min(self.given, self.step.mean(axis=0).min())

    def arrival(self) -> Arrival:
        """Returns the result."""
        hopeless = np.all(self.error >= self.start, axis=0)
        return Arrival(self.step, self.output, hopeless)

    def _chosen(self, now: int, last: bool) -> np.ndarray:
        """Returns which outputs to look at: those due and, from the best step on, all.

        An output of which nothing is known since before the best step might have
        arrived before it.
        """
        t = self.times[now]
        waiting = self.racing() & np.isinf(self.step) & (self.looked < now)
        return waiting & (last | (self.due <= t) | (t >= self.best()))

    def _earliest(self) -> np.ndarray:
        """Returns the earliest step at which each run can have arrived, `(R, S)`."""
        times = np.array([*self.times, self.times[-1] + 1 if self.times else 1])
        unseen = times[self.looked.min(axis=0) + 1]
        return np.where(np.isinf(self.step), unseen, self.step)

    def _evaluate(self, now: int, chosen: np.ndarray, errors_of: Callable) -> None:
        """Looks at the chosen outputs; if one has arrived, at what it skipped."""
        error = self._errors(now, chosen, errors_of)
        self.error[chosen] = error
        arrived = np.zeros_like(chosen)
        arrived[chosen] = error <= self.target
        runs = np.any(arrived, axis=0)
        since = self.looked.copy()
        self.looked[chosen] = now
        with np.errstate(over="ignore"):
            wait = np.minimum((error / self.target) ** PATIENCE, LONGEST_WAIT)
        self.due[chosen] = self.times[now] * wait
        if runs.any():
            self._go_back(since, now, runs, errors_of)

    def _go_back(
        self, since: np.ndarray, now: int, runs: np.ndarray, errors_of: Callable
    ) -> None:
        """Finds the first look at which some output of these runs had arrived."""
        for i in range(since[:, runs].min() + 1, now + 1):
            chosen = (since < i) & runs & np.isinf(self.step)
            if not chosen.any():
                continue
            error = np.full(chosen.shape, np.inf)
            error[chosen] = self._errors(i, chosen, errors_of)
            new = (error <= self.target).any(axis=0)
            self.step[new] = self.times[i]
            self.output[new] = error.argmin(axis=0)[new]

    def _errors(self, i: int, chosen: np.ndarray, errors_of: Callable) -> np.ndarray:
        """Evaluates some outputs at a look."""
        return errors_of(np.asarray(self.held[i])[chosen])

    def _forget(self) -> None:
        """Drops the outputs that everybody in the race has been looked at."""
        open_runs = self.racing() & np.isinf(self.step)
        least = self.looked[:, open_runs].min() if open_runs.any() else len(self.times)
        for i in [i for i in self.held if i <= least]:
            del self.held[i]
