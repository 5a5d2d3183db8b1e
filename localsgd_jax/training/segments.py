"""Plan of the dispatches of a run: number of steps, program, evaluation and saving."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from localsgd_jax.core.predicates import checked_predicate
from localsgd_jax.training.callbacks import Callbacks
from localsgd_jax.training.run_context import RunContext, RunSettings

# Number of dispatches whose steps are searched for a cycle of the schedule.
_HORIZON = 16


class Segment(NamedTuple):
    """Local steps that run on the devices in one dispatch.

    Attributes:
      steps: number of local steps.
      period: number of steps before each synchronisation of the segment, which divides
        `steps`; None for local steps only.
      due: for each step, whether workers synchronise after it.
      end_step: number of local steps of the run after the segment.
      round: number of the round of the first step, 1 for the first.
      evaluates: whether the mean model is evaluated after the segment.
      saves: whether the state is saved after the segment.
    """

    steps: int
    period: int | None
    due: tuple[bool, ...]
    end_step: int
    round: int = 1
    evaluates: bool = False
    saves: bool = False


def segments(
    settings: RunSettings,
    context: RunContext,
    callbacks: Callbacks,
    count_ready: Callable[[], int],
    rounds_are_alike: bool = True,
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
      rounds_are_alike: whether all rounds have the same program; else a segment has
        one round.

    Yields:
      Segments without gaps.
    """
    schedule = checked_predicate("train(schedule)", settings.schedule)
    max_steps = settings.max_steps_per_dispatch
    step, round_number = context.step, context.round
    while limit := count_ready():
        if callbacks.save:
            limit = min(limit, callbacks.save_every - step % callbacks.save_every)
        if callbacks.evaluate:
            num_rounds = callbacks.evaluate_every
            num_rounds -= round_number % callbacks.evaluate_every
            limit = _steps_of_rounds(schedule, step, limit, num_rounds)
        segment = next_segment(schedule, step, limit, max_steps, rounds_are_alike)
        segment = segment._replace(round=round_number + 1)
        step, round_number = segment.end_step, round_number + sum(segment.due)
        ends_round = any(segment.due)
        yield segment._replace(
            evaluates=ends_round and callbacks.evaluates_at(round_number),
            saves=callbacks.saves_at(step),
        )


def next_segment(
    schedule: Callable,
    start: int,
    limit: int,
    max_steps_per_dispatch: int,
    rounds_are_alike: bool = True,
) -> Segment:
    """Chooses the next segment such that few different programs are compiled.

    The last steps of a round are in one segment with its synchronisation, so that the
    program can send during these steps what it has before them. A round longer than
    `max_steps_per_dispatch` begins with segments of local steps only, of which the
    first is the shortest. If rounds of equal length follow each other, a segment has as
    many as fit. Where the lengths are not cyclic, each is a sum of powers of two.

    Args:
      schedule: predicate on the number of local steps.
      start: local steps done.
      limit: most steps before the host must evaluate, save or read other batches.
      max_steps_per_dispatch: most steps of a segment.
      rounds_are_alike: as in `segments`.

    Returns:
      A segment of at most `limit` steps.

    Example:
      >>> from localsgd_jax import schedules
      >>> next_segment(schedules.every(4), 8, limit=64, max_steps_per_dispatch=10)[:2]
      (8, 4)
      >>> next_segment(schedules.every(100), 0, limit=64, max_steps_per_dispatch=64)[:2]
      (36, None)
      >>> next_segment(schedules.every(100), 36, 64, max_steps_per_dispatch=64)[:2]
      (64, 64)
    """
    max_steps = max_steps_per_dispatch
    lengths, is_cyclic = _round_lengths(schedule, start, max_steps)
    length = lengths[0] if lengths else 0

    def make(steps: int, period: int | None = None) -> Segment:
        due = tuple(bool(period) and i % period == 0 for i in range(1, steps + 1))
        return Segment(steps, period, due, start + steps)

    if 0 < length <= min(limit, max_steps):
        count = max_steps // length
        fits = rounds_are_alike and length < count * length <= limit
        if fits and lengths[:count] == [length] * count:
            return make(count * length, length)
        rest = length - _power_of_two(length)
        if is_cyclic or rest == 0 or length == max_steps:
            return make(length, length)
        return make(_power_of_two(rest))
    if limit < max_steps:
        return make(_power_of_two(limit))
    rest = length % max_steps or max_steps
    return make(rest if is_cyclic or rest == max_steps else _power_of_two(rest))


def _round_lengths(
    schedule: Callable, start: int, max_steps: int
) -> tuple[list[int], bool]:
    """Returns the lengths of the next rounds and whether they are cyclic.

    The first round counts from `start` on. The lengths cover `max_steps`, and more
    steps until they have a cycle.
    """
    lengths, end, is_cyclic = [], 0, False
    for i in range(1, _HORIZON * max_steps + 1):
        if schedule(start + i):
            lengths.append(i - end)
            end = i
            half, is_odd = divmod(len(lengths), 2)
            is_cyclic |= not is_odd and lengths[:half] == lengths[half:]
        if is_cyclic and i >= max_steps:
            break
    return lengths, is_cyclic


def _power_of_two(number: int) -> int:
    """Returns the largest power of two that is at most a positive number."""
    return 1 << (number.bit_length() - 1)


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
