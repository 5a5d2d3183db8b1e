"""Schedules for streaming and delayed rules: even spacing, lead and lag."""

import itertools

import jax

from localsgd_jax.core.validation import check, check_int, check_type
from localsgd_jax.schedules.schedule import Schedule, Step

CHECKED_STEPS = 1000
"""Number of steps over which the spacing of a schedule is checked."""


def evenly_spaced(h: int, n: int) -> Schedule:
    """Synchronises n times in every h steps, evenly spaced.

        I = {ch + ⌊(p + 1)h/n⌋ : c = 0, 1, …, p = 0, …, n − 1}

    The spacing is as even as integer steps allow. Fragment p of `fragment(rule, n)` is
    synchronised every h steps exactly, whether n divides h or not.
    `evenly_spaced(h, 1)` equals `every(h)`.

    Args:
      h: period of a fragment in local steps.
      n: number of fragments, at most h.

    Returns:
      A schedule.

    Raises:
      TypeError: if an argument is not an int.
      ValueError: if an argument is below 1, or n above h.

    Example:
      >>> evenly_spaced(10, 4).steps(20)
      [2, 5, 7, 10, 12, 15, 17, 20]

    References:
      Douillard et al., Streaming DiLoCo with overlapping communication, 2025, section
      2.2. arXiv:2501.18512
    """
    h = check_int("evenly_spaced(h)", "h", h, 1)
    n = check_int("evenly_spaced(n)", "n", n, 1)
    if n > h:
        raise ValueError(
            f"evenly_spaced(h, n): n must be at most h, got n = {n} and h = {h}"
        )

    # t = ⌊mh/n⌋ for an integer m if one lies in [tn/h, (t + 1)n/h), that is, if the
    # ends of the interval have different ⌈·⌉.
    def due(t: Step) -> bool | jax.Array:
        return (t > 0) & ((t * n + n - 1) // h > (t * n - 1) // h)

    return Schedule(due, f"evenly_spaced({h}, {n})")


def with_lead(schedule: Schedule, tau: int) -> Schedule:
    """Adds a synchronisation τ steps before each one of a schedule.

        I = {s − τ, s : s ∈ J}

    For `delay(rule)`: it takes snapshots at s − τ and applies the rule to them at s.

    Args:
      schedule: J.
      tau: τ, below the smallest number of steps between two indices of J.

    Returns:
      A schedule.

    Raises:
      TypeError: if schedule is not a `Schedule` or tau not an int.
      ValueError: if τ is below 1 or not below the spacing of J, which is checked over
        the first 1000 steps.

    Example:
      >>> import localsgd_jax as lsgd
      >>> with_lead(lsgd.every(6), 2).steps(12)
      [4, 6, 10, 12]

    References:
      Douillard et al., Streaming DiLoCo with overlapping communication, 2025, section
      2.3. arXiv:2501.18512
    """
    tau = _check_offset("with_lead", schedule, tau)
    return Schedule(
        lambda t: schedule(t) | ((t > 0) & schedule(t + tau)),
        f"with_lead({schedule!r}, {tau})",
    )


def with_lag(schedule: Schedule, tau: int) -> Schedule:
    """Adds a synchronisation τ steps after each one of a schedule.

        I = {s, s + τ : s ∈ J}

    For `delay(rule)`: it takes snapshots at s and applies the rule to them at s + τ.

    Args:
      schedule: J.
      tau: τ, below the smallest number of steps between two indices of J.

    Returns:
      A schedule.

    Raises:
      TypeError: if schedule is not a `Schedule` or tau not an int.
      ValueError: if τ is below 1 or not below the spacing of J, which is checked over
        the first 1000 steps.

    Example:
      >>> import localsgd_jax as lsgd
      >>> with_lag(lsgd.every(6), 2).steps(14)
      [6, 8, 12, 14]
    """
    tau = _check_offset("with_lag", schedule, tau)
    return Schedule(
        lambda t: schedule(t) | ((t > tau) & schedule(t - tau)),
        f"with_lag({schedule!r}, {tau})",
    )


def _check_offset(call: str, schedule: Schedule, tau: int) -> int:
    """Returns τ; raises unless it is below the spacing of the schedule."""
    check_type(f"{call}(schedule)", "schedule", schedule, Schedule)
    tau = check_int(f"{call}(tau)", "tau", tau, 1)
    steps = [0, *schedule.steps(CHECKED_STEPS)]
    spacing = min((b - a for a, b in itertools.pairwise(steps)), default=tau + 1)
    rule = (
        f"tau must be smaller than the {spacing} steps between two indices of "
        f"{schedule!r}"
    )
    check(tau < spacing, f"{call}(schedule, tau)", rule, tau)
    return tau
