"""Schedules of asynchronous workers: one for all, or one for each."""

import numbers
from collections.abc import Callable, Sequence

from localsgd_jax.core.validation import check_int, describe
from localsgd_jax.schedules.periodic import every


def resolve_schedules(
    call: str, schedule: int | Callable | Sequence, workers: int
) -> list[Callable]:
    """Returns one schedule for each worker.

    Args:
      call: public call and argument, for messages.
      schedule: a period, a schedule, or a list or tuple of K of them.
      workers: K.

    Returns:
      K schedules; a period h becomes `every(h)`.

    Raises:
      TypeError: if an element is neither an int nor callable.
      ValueError: if the number of schedules is not K, or a period is below 1.

    Example:
      >>> resolve_schedules("run(schedule)", [2, every(3)], workers=2)
      [every(2), every(3)]
    """
    is_sequence = isinstance(schedule, list | tuple)
    schedules: list = list(schedule) if is_sequence else [schedule] * workers
    if len(schedules) != workers:
        raise ValueError(
            f"{call}: one schedule or {workers} are needed, one for each worker, got "
            f"{len(schedules)}"
        )
    for item in schedules:
        if not (callable(item) or isinstance(item, numbers.Integral)):
            text = f"a period or a schedule is needed, got {describe(item)}"
            raise TypeError(f"{call}: {text}")
    name = "a period"
    return [
        item if callable(item) else every(check_int(call, name, item, 1))
        for item in schedules
    ]
