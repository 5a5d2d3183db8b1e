"""The type of synchronisation schedules: predicates on the number of local steps."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Step = int | jax.Array
"""Number of local steps done: a Python int, or a scalar int32 array, perhaps traced."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A set of synchronisation indices I ⊂ {1, 2, …}.

    Attributes:
      due: `due(t)`, whether t ∈ I: a bool for a Python int, a scalar boolean array for
        an array, traced or not.
      name: the call that made the schedule.
    """

    due: Callable[[Step], bool | jax.Array]
    name: str

    def __call__(self, step: Step) -> bool | jax.Array:
        """Returns whether workers synchronise after local step `step`."""
        return self.due(step)

    def steps(self, until: int) -> list[int]:
        """Returns the synchronisation indices up to and including `until`."""
        return [t for t in range(1, until + 1) if self.due(t)]

    def gap(self, until: int) -> int:
        """Returns the length of the longest round up to step T = `until`.

            gap(I) = maxᵢ (pᵢ − pᵢ₋₁),   p₀ = 0, I ∪ {T} = {p₁ < p₂ < …}

        Step T ends the last round.

        References:
          Stich 2019, Definition 2.1.
        """
        ends = [0, *self.steps(until), until]
        return max(end - start for start, end in itertools.pairwise(ends))

    def __repr__(self) -> str:
        """Returns the call that made this schedule."""
        return self.name


def isin(step: Step, steps: frozenset[int]) -> bool | jax.Array:
    """Returns whether a step is an element of a finite set.

    Args:
      step: a Python int or a scalar integer array.
      steps: the elements.

    Returns:
      A bool for a Python int, a scalar boolean array for an array.
    """
    if isinstance(step, jax.Array):
        return jnp.any(step == jnp.array(sorted(steps), dtype=step.dtype))
    return step in steps
