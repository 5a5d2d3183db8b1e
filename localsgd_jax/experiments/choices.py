"""What a word on the command line stands for: optimizers, step sizes, schedules."""

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
    "growing",
    "quadratic:ALPHA",
    "at:STEP,STEP,...",
)
PERIOD = 8
_WITHOUT_PERIOD = ("never", "at")


def peak_learning_rate(optimizer: str, curvature: float) -> float:
    """Returns the learning rate to start from if none is given.

    With the curvature L_B of a batch:

        η₀ = 6/L_B (sgd),   0.6/L_B (momentum 0.9),   0.05 (adam, adamw)

    Steps beyond 2/L_B pay since the curvature at the minimum is far below the bound
    L_B. The adaptive optimizers do not see the scale of the gradient.

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


def decay(peak: float, steps: int) -> Callable:
    """Returns the learning rate η(t) = η₀ (1 − t/T).

    Args:
      peak: η₀.
      steps: T.

    Returns:
      An optax schedule.

    Example:
      >>> float(decay(2.0, 4)(1))
      1.5
    """
    return optax.linear_schedule(peak, 0.0, steps)


def parse_schedule(
    text: str, period: int | None, learning_rate: Callable
) -> lsgd.Schedule:
    """Makes the schedule that NAME or NAME:ARGUMENT stands for.

    Args:
      text: one of `SCHEDULES`.
      period: H, for those that have one; None means 8.
      learning_rate: η, for quadratic.

    Returns:
      A schedule.

    Raises:
      ValueError: for an unknown name, an argument that is missing, superfluous or out
        of range, or a period where there is none.

    Example:
      >>> parse_schedule("post-local:100", 16, lambda t: 0.1)
      post_local(100, 16)
    """
    name, colon, argument = text.partition(":")
    known = {entry.partition(":")[0]: entry for entry in SCHEDULES}
    if name not in known:
        raise ValueError(f"--schedule: one of {', '.join(SCHEDULES)}, got {text!r}")
    if bool(argument) != (":" in known[name]) or (colon and not argument):
        raise ValueError(f"--schedule: it must read {known[name]}, got {text!r}")
    if period is not None and name in _WITHOUT_PERIOD:
        raise ValueError(f"--period: --schedule {name} has no period, got {period}")
    h = resolve_period(text, period) or PERIOD
    try:
        return _MAKERS[name](argument, h, learning_rate)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"--schedule {text}: {error}") from None


def resolve_period(text: str, period: int | None) -> int | None:
    """Returns the period H of a schedule, or None if it has none.

    Args:
      text: as for `parse_schedule`.
      period: the one given, if any.

    Returns:
      H.

    Example:
      >>> resolve_period("every", None), resolve_period("at:3,7", None)
      (8, None)
    """
    if text.partition(":")[0] in _WITHOUT_PERIOD:
        return None
    return PERIOD if period is None else period


def _quadratic(argument: str, h: int, learning_rate: Callable) -> lsgd.Schedule:
    """Makes a quadratic schedule; infinite and NaN coefficients are refused."""
    if not math.isfinite(alpha := float(argument)):
        raise ValueError(f"ALPHA must be finite, got {alpha}")
    return lsgd.quadratic(learning_rate, alpha, h)


_MAKERS = {
    "every": lambda argument, h, learning_rate: lsgd.every(h),
    "never": lambda argument, h, learning_rate: lsgd.never(),
    "post-local": lambda argument, h, learning_rate: lsgd.post_local(int(argument), h),
    "growing": lambda argument, h, learning_rate: lsgd.growing(h),
    "quadratic": _quadratic,
    "at": lambda argument, h, learning_rate: lsgd.at(map(int, argument.split(","))),
}
