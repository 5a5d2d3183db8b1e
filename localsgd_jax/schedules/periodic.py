"""Schedules with a fixed period, with fixed steps, or without synchronisation."""

from collections.abc import Iterable

import jax

from localsgd_jax.core.validation import check_int, check_type
from localsgd_jax.schedules.schedule import Schedule, Step, isin


def every(h: int) -> Schedule:
    """Synchronises after local steps h, 2h, 3h and so on.

        I = {t : t mod h = 0}

    The first round has h steps like all others. `every(1)` is synchronous SGD.

    Args:
      h: period in local steps, at least 1.

    Returns:
      A schedule.

    Raises:
      TypeError: if h is not an int.
      ValueError: if h < 1.

    Example:
      >>> every(4).steps(12)
      [4, 8, 12]

    References:
      Stich 2019, section 2; H there.
    """
    h = check_int("every(h)", "h", h, 1)
    return Schedule(lambda t: (t > 0) & (t % h == 0), f"every({h})")


def never() -> Schedule:
    """Synchronises after no local step: one-shot averaging.

        I = ∅

    Returns:
      A schedule. `train` synchronises once, after the last step.

    Example:
      >>> never().steps(1000), never().gap(1000)
      ([], 1000)

    References:
      Stich 2019, section 2: I_T = {T}.
    """
    # The condition is always false and has the type of t: a bool or a boolean array.
    return Schedule(lambda t: (t > 0) & (t < 0), "never()")


def at_steps(steps: Iterable[int]) -> Schedule:
    """Synchronises after the given local steps and no others.

        I = {p₁ < p₂ < … < pₙ}

    Args:
      steps: positive ints, in any order.

    Returns:
      A schedule.

    Raises:
      TypeError: if an element is not an int.
      ValueError: if there are no steps, or one is below 1.

    Example:
      >>> at_steps([2, 3, 7]).steps(10), at_steps([2, 3, 7]).gap(7)
      ([2, 3, 7], 4)

    References:
      Stich 2019, Definition 2.1.
    """
    check_type("at_steps(steps)", "steps", steps, Iterable)
    indices = frozenset(check_int("at_steps(steps)", "each step", t, 1) for t in steps)
    if not indices:
        raise ValueError("at_steps(steps): at least one step is needed, got none")
    return Schedule(lambda t: isin(t, indices), f"at_steps({sorted(indices)})")


def post_local(switch: int, h: int) -> Schedule:
    """Synchronises after every step until `switch`, then every h steps.

        I = {1, …, s} ∪ {s + h, s + 2h, …}

    `post_local(0, h)` equals `every(h)`.

    Args:
      switch: s, the last step of the synchronous phase, at least 0.
      h: period after it, at least 1.

    Returns:
      A schedule.

    Raises:
      TypeError: if an argument is not an int.
      ValueError: if switch < 0 or h < 1.

    Example:
      >>> post_local(3, 4).steps(12)
      [1, 2, 3, 7, 11]

    References:
      Lin, Stich, Patel, Jaggi, Don't Use Large Mini-batches, Use Local SGD, 2020,
      section 3. arXiv:1808.07217
    """
    switch = check_int("post_local(switch)", "switch", switch, 0)
    h = check_int("post_local(h)", "h", h, 1)

    def due(t: Step) -> bool | jax.Array:
        return (t > 0) & ((t <= switch) | ((t - switch) % h == 0))

    return Schedule(due, f"post_local({switch}, {h})")
