"""Settings of a run, its processes and the counters at its start."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax

from localsgd_jax import schedules
from localsgd_jax.core.types import State
from localsgd_jax.core.validation import check_int, check_type
from localsgd_jax.distributed import arrays
from localsgd_jax.training.round_weights import RoundWeights


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Arguments of `localsgd_jax.train` that determine its programs.

    Attributes:
      schedule: predicate on the number of local steps.
      steps: most local steps of the run; None for all batches.
      weights: weights of the rounds.
      max_steps_per_dispatch: most local steps of one dispatch.

    Raises:
      TypeError: if a number of steps is not an int.
      ValueError: if a number of steps is out of range.
    """

    schedule: Callable
    steps: int | None
    weights: RoundWeights | None
    max_steps_per_dispatch: int

    def __post_init__(self) -> None:
        """Validates the schedule and the numbers of steps."""
        check_type("train(schedule)", "schedule", self.schedule, Callable)
        if self.steps is not None:
            check_int("train(steps)", "steps", self.steps, 0)
        name = "max_steps_per_dispatch"
        check_int(f"train({name})", name, self.max_steps_per_dispatch, 1)


def train_schedule(schedule: int | Callable) -> Callable:
    """Returns the schedule of a training loop; a period h becomes `every(h)`.

    Args:
      schedule: argument of `train`.

    Returns:
      The schedule.

    Raises:
      TypeError: if it is neither a period nor callable.
      ValueError: if the period is below 1.

    Example:
      >>> train_schedule(4)
      every(4)
    """
    if callable(schedule):
        return schedule
    return schedules.every(check_int("train(schedule)", "a period", schedule, 1))


class RunContext(NamedTuple):
    """Processes and initial counters of a run.

    Attributes:
      processes: indices of the processes that hold the state.
      is_primary: whether this process is the lowest of them, which calls `on_round_end`
        and shows the progress bar.
      step: local steps done before the run.
      round: synchronisations done before the run.
    """

    processes: list[int]
    is_primary: bool
    step: int
    round: int

    @property
    def is_multi_process(self) -> bool:
        """Whether several processes hold the state."""
        return len(self.processes) > 1


def context_of(state: State) -> RunContext:
    """Returns the context of a run that starts from a state.

    Args:
      state: state of a cluster before the first dispatch.

    Returns:
      The context.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5))
      >>> context_of(lsgd.simulate(algorithm, workers=2).init(jnp.zeros(())))
      RunContext(processes=[0], is_primary=True, step=0, round=0)
    """
    processes = arrays.processes_of(state.step.sharding)
    is_primary = jax.process_index() == processes[0]
    return RunContext(processes, is_primary, int(state.step), int(state.round))
