"""Optimizers and schedules by their command-line names."""

import math
from collections.abc import Callable
from functools import partial

import optax

import localsgd_jax as lsgd

OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
}
SCHEDULES = (
    "every",
    "never",
    "post-local:SWITCH",
    "geometric",
    "qsr:ALPHA",
    "at-steps:STEP,STEP,...",
)
DEFAULT_PERIOD = 8
_WITHOUT_PERIOD = ("never", "at-steps")


def peak_learning_rate(optimizer: str, curvature: float) -> float:
    """Returns the default initial learning rate of an optimizer.

    With the curvature L_B of a batch:

        η₀ = 6/L_B (sgd),   0.6/L_B (momentum 0.9),   0.05 (adam, adamw)

    Steps larger than 2/L_B converge faster since the curvature at the minimum is far
    below the bound L_B. The adaptive optimizers are invariant to the scale of the
    gradient.

    Args:
      optimizer: a name in `OPTIMIZERS`.
      curvature: L_B.

    Returns:
      η₀.

    Example:
      >>> peak_learning_rate("sgd", 2.0), peak_learning_rate("adam", 2.0)
      (3.0, 0.05)
    """
    rates = {"sgd": 6 / curvature, "momentum": 0.6 / curvature}
    return rates.get(optimizer, 0.05)


def linear_decay(peak: float, steps: int) -> Callable:
    """Returns the learning rate schedule η(t) = η₀ (1 − t/T).

    Args:
      peak: η₀.
      steps: T.

    Returns:
      An optax schedule.

    Example:
      >>> float(linear_decay(2.0, 4)(1))
      1.5
    """
    return optax.linear_schedule(peak, 0.0, steps)


def parse_schedule(
    text: str, period: int | None, learning_rate: Callable
) -> lsgd.Schedule:
    """Parses NAME or NAME:ARGUMENT into a synchronisation schedule.

    Args:
      text: one of `SCHEDULES`.
      period: H of a schedule that has one; None for the default, 8.
      learning_rate: η(t), for qsr.

    Returns:
      The schedule.

    Raises:
      ValueError: if the name is unknown, the argument is missing, superfluous or out
        of range, or a period is given for a schedule without one.

    Example:
      >>> parse_schedule("post-local:100", 16, lambda t: 0.1)
      post_local(100, 16)
    """
    name, colon, argument = text.partition(":")
    forms = {form.partition(":")[0]: form for form in SCHEDULES}
    if name not in forms:
        raise ValueError(
            f"--schedule must be one of {', '.join(SCHEDULES)}, got {text!r}"
        )
    if bool(argument) != (":" in forms[name]) or (colon and not argument):
        raise ValueError(f"--schedule must have the form {forms[name]}, got {text!r}")
    if period is not None and name in _WITHOUT_PERIOD:
        raise ValueError(f"--period: --schedule {name} has no period, got {period}")
    h = resolve_period(text, period) or DEFAULT_PERIOD
    try:
        return _SCHEDULE_FACTORIES[name](argument, h, learning_rate)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"--schedule {text}: {error}") from None


def resolve_period(text: str, period: int | None) -> int | None:
    """Returns the period H of a schedule, or None if it has none.

    Args:
      text: one of `SCHEDULES`.
      period: the period given, or None.

    Returns:
      H.

    Example:
      >>> resolve_period("every", None), resolve_period("at-steps:3,7", None)
      (8, None)
    """
    if text.partition(":")[0] in _WITHOUT_PERIOD:
        return None
    return DEFAULT_PERIOD if period is None else period


def _qsr(argument: str, h: int, learning_rate: Callable) -> lsgd.Schedule:
    """Returns a quadratic schedule; raises if alpha is infinite or NaN."""
    if not math.isfinite(alpha := float(argument)):
        raise ValueError(f"ALPHA must be finite, got {alpha}")
    return lsgd.qsr(learning_rate, alpha, h)


_SCHEDULE_FACTORIES = {
    "every": lambda argument, h, rate: lsgd.every(h),
    "never": lambda argument, h, rate: lsgd.never(),
    "post-local": lambda argument, h, rate: lsgd.post_local(int(argument), h),
    "geometric": lambda argument, h, rate: lsgd.geometric(h),
    "qsr": _qsr,
    "at-steps": lambda argument, h, rate: lsgd.at_steps(map(int, argument.split(","))),
}
