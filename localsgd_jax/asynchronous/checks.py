"""Refusals: the call, the rule and the value."""

import numbers
from collections.abc import Callable, Sequence

from localsgd_jax import schedules


def holds(call: str, rule: str, value: float, kept: bool) -> None:
    """Refuses a number that breaks its rule; NaN breaks all."""
    if not kept:
        raise ValueError(f"{call}: it must be {rule}, got {value}")


def whole(call: str, value: int) -> int:
    """Returns a positive int; refuses anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{call}: it must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{call}: it must be at least 1, got {value}")
    return int(value)


def as_schedules(
    call: str, every: int | Callable | Sequence, workers: int
) -> list[Callable]:
    """Returns one schedule for each worker."""
    many: list = list(every) if isinstance(every, list | tuple) else [every] * workers
    if len(many) != workers:
        raise ValueError(
            f"{call}: one schedule or {workers} are needed, one for each worker, got "
            f"{len(many)}"
        )
    for one in many:
        if not (callable(one) or isinstance(one, numbers.Integral)):
            raise TypeError(f"{call}: a period or a schedule is needed, got {one!r}")
    return [one if callable(one) else schedules.every(one) for one in many]
