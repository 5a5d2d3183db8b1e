"""Plan of the dispatches of a run: number of steps, program, evaluation and saving."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from localsgd_jax.training.callbacks import Callbacks
from localsgd_jax.training.run_context import RunContext, RunSettings


class Segment(NamedTuple):
    """Local steps that run on the devices in one dispatch.

    Attributes:
      steps: number of local steps.
      period: length of the rounds if the segment consists of whole rounds of equal
        length, which run fused; None for gated steps.
      due: for each step, whether workers synchronise after it.
      end_step: number of local steps of the run after the segment.
      evaluates: whether the mean model is evaluated after the segment.
      saves: whether the state is saved after the segment.
    """

    steps: int
    period: int | None
    due: tuple[bool, ...]
    end_step: int
    evaluates: bool = False
    saves: bool = False


def segments(
    settings: RunSettings,
    context: RunContext,
    callbacks: Callbacks,
    count_ready: Callable[[], int],
) -> Iterator[Segment]:
    """Yields the segments of a run until its batches end.

    A segment ends at the latest at the next evaluation and at the next step to save.
    Both are counted from step 0, so that a resumed run evaluates, saves and dispatches
    as an uninterrupted one. A segment is planned when it is requested, so that the
    schedule may change and batches may be read between two requests.

    Args:
      settings: schedule and most steps of a segment.
      context: counters at the start of the run.
      callbacks: evaluation and saving.
      count_ready: returns how many batches of equal shapes can be dispatched now; 0
        ends the iteration.

    Yields:
      Segments without gaps.
    """
    schedule, max_steps = settings.schedule, settings.max_steps_per_dispatch
    step, round_number = context.step, context.round
    while limit := count_ready():
        if callbacks.save:
            limit = min(limit, callbacks.save_every - step % callbacks.save_every)
        if callbacks.evaluate:
            num_rounds = callbacks.evaluate_every
            num_rounds -= round_number % callbacks.evaluate_every
            limit = _steps_of_rounds(schedule, step, limit, num_rounds)
        segment = next_segment(schedule, step, limit, max_steps)
        step, round_number = segment.end_step, round_number + sum(segment.due)
        ends_round = any(segment.due)
        yield segment._replace(
            evaluates=ends_round and callbacks.evaluates_at(round_number),
            saves=callbacks.saves_at(step),
        )


def next_segment(
    schedule: Callable, start: int, limit: int, max_steps_per_dispatch: int
) -> Segment:
    """Chooses the next segment such that few different programs are compiled.

    Where the schedule is regular, a segment has as many whole rounds as fit into
    `max_steps_per_dispatch`, or one round. Elsewhere it has `max_steps_per_dispatch`
    gated steps, or one.

    Args:
      schedule: predicate on the number of local steps.
      start: local steps done.
      limit: most steps before the host must evaluate, save or read other batches.
      max_steps_per_dispatch: most steps of a segment.

    Returns:
      A segment of at most `limit` steps.

    Example:
      >>> from localsgd_jax import schedules
      >>> next_segment(schedules.every(4), 8, limit=64, max_steps_per_dispatch=10)[:2]
      (8, 4)
      >>> next_segment(schedules.at_steps([3]), 0, limit=64, max_steps_per_dispatch=4)
      Segment(steps=4, period=None, due=(False, False, True, False), end_step=4, \
evaluates=False, saves=False)
    """

    def is_regular(period: int, steps: int) -> bool:
        return all(
            bool(schedule(start + i)) == (i % period == 0) for i in range(1, steps + 1)
        )

    def make(steps: int, period: int | None) -> Segment:
        due = tuple(bool(schedule(start + i)) for i in range(1, steps + 1))
        return Segment(steps, period, due, start + steps)

    max_steps = min(limit, max_steps_per_dispatch)
    period = next((i for i in range(1, max_steps + 1) if schedule(start + i)), None)
    if period and is_regular(period, 2 * period):
        steps = max_steps_per_dispatch // period * period
        fits = steps <= limit and is_regular(period, steps)
        return make(steps if fits else period, period)
    return make(max_steps_per_dispatch if max_steps_per_dispatch <= limit else 1, None)


def _steps_of_rounds(
    schedule: Callable, start: int, limit: int, num_rounds: int
) -> int:
    """Returns the number of steps until `num_rounds` rounds have ended, or `limit`."""
    ended = 0
    for steps in range(1, limit + 1):
        ended += bool(schedule(start + steps))
        if ended == num_rounds:
            return steps
    return limit
