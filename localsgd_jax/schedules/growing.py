"""Schedules with a growing period: geometric, or by the learning rate (QSR)."""

import bisect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from localsgd_jax.core.validation import MAX_INT32, check_int, check_number, check_type
from localsgd_jax.schedules.schedule import Schedule, Step


def geometric(h: int, rounds: int = 1, factor: int = 2) -> Schedule:
    """Lengthens the period geometrically from 1 to h.

    Round r = 0, 1, … has

        Hᵣ = min(h, factor^⌊r / rounds⌋)

    steps, so workers communicate often early in training and rarely later.

    Args:
      h: final period, at least 1.
      rounds: number of rounds before each lengthening, at least 1.
      factor: ratio of the lengths of a round after and before, at least 2.

    Returns:
      A schedule. `geometric(1)` equals `every(1)`.

    Raises:
      TypeError: if an argument is not an int.
      ValueError: if an argument is below its minimum.

    Example:
      >>> geometric(8).steps(40)
      [1, 3, 7, 15, 23, 31, 39]

    References:
      Zhang, De Sa, Mitliagkas, Ré, Parallel SGD: When Does Averaging Help?, 2016.
      arXiv:1606.07365. Stich 2019 advises it where T is unknown.
    """
    h = check_int("geometric(h)", "h", h, 1)
    rounds = check_int("geometric(rounds)", "rounds", rounds, 1)
    factor = check_int("geometric(factor)", "factor", factor, 2)
    # Start and period of each stage of equal rounds; the last stage has no end. Stages
    # that begin beyond the int32 range of a step are never reached.
    stages, period = [(0, 1)], 1
    while period < h and stages[-1][0] <= MAX_INT32:
        start, period = stages[-1][0] + rounds * period, min(h, period * factor)
        stages.append((start, period))
    stages = [stage for stage in stages if stage[0] <= MAX_INT32]

    def due(t: Step) -> bool | jax.Array:
        is_end = t < 0
        for start, period in stages:
            in_stage_before, ends_round = t <= start, (t - start) % period == 0
            is_end = (in_stage_before & is_end) | ((t > start) & ends_round)
        return is_end

    return Schedule(due, f"geometric({h}, {rounds}, {factor})")


def qsr(
    lr_schedule: Callable[[Step], float | jax.Array], alpha: float, h_base: int
) -> Schedule:
    """Lengthens the period as the learning rate falls (QSR).

    The round that starts after t local steps has

        H = max(h_base, ⌊(alpha / η(t))²⌋)

    steps; its length is fixed at its start. A traced step replays all rounds from the
    first, which costs one evaluation of η per round so far. `train` passes Python
    ints, for which the ends of the rounds are cached. Where η is 0 the round has no
    end: let a warm-up start above it.

    Args:
      lr_schedule: η, from the number of local steps to the learning rate, such as an
        optax schedule.
      alpha: growth coefficient, positive.
      h_base: smallest period, at least 1.

    Returns:
      A schedule. A constant η ≥ alpha gives `every(h_base)`.

    Raises:
      TypeError: if lr_schedule is not callable or h_base not an int.
      ValueError: if alpha is not positive or h_base < 1.

    Example:
      >>> import optax
      >>> halved = optax.piecewise_constant_schedule(0.2, {8: 0.5})
      >>> qsr(halved, alpha=0.3, h_base=4).steps(30)
      [4, 8, 17, 26]

    References:
      Gu, Lyu, Arora, Zhang, Huang, A Quadratic Synchronization Rule for Distributed
      Deep Learning, 2024. arXiv:2310.14423
    """
    check_type("qsr(lr_schedule)", "lr_schedule", lr_schedule, Callable)
    check_number("qsr(alpha)", "alpha", alpha, above=0)
    h_base = check_int("qsr(h_base)", "h_base", h_base, 1)

    def period(t: Step) -> jax.Array:
        ratio = alpha / jnp.asarray(lr_schedule(t), jnp.float32)
        # The tolerance keeps a ratio that is an integer in exact arithmetic an integer
        # in float32, so that Python ints and traced ints give equal rounds. The upper
        # limit keeps the sum of round lengths below within int32.
        length = jnp.clip(jnp.floor(ratio**2 * (1 + 1e-6)), h_base, 2.0**29)
        return jnp.where(ratio > 0, length, 2.0**29).astype(jnp.int32)

    ends = [0]

    def due_concrete(t: int) -> bool:
        with jax.ensure_compile_time_eval():
            while ends[-1] < t:
                ends.append(ends[-1] + int(period(ends[-1])))
        return t > 0 and ends[bisect.bisect_left(ends, t)] == t

    def due_array(t: jax.Array) -> jax.Array:
        def next_round_end(end: jax.Array) -> jax.Array:
            return end + period(end)

        end = jax.lax.while_loop(lambda end: end < t, next_round_end, jnp.zeros_like(t))
        return (t > 0) & (end == t)

    def due(t: Step) -> bool | jax.Array:
        return due_array(t) if isinstance(t, jax.Array) else due_concrete(t)

    return Schedule(due, f"qsr(…, {alpha}, {h_base})")
