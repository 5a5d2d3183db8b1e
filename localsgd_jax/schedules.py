"""When workers agree: functions of the number of local updates done.

A schedule answers "synchronise now?" after local update t = 1, 2, 3, … for a Python
int with a bool, and for a traced int with a traced bool.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from localsgd_jax import checks

Step = int | jax.Array


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A set of synchronisation indices I ⊂ {1, 2, …}.

    Attributes:
      due: whether t ∈ I, for a Python int or a traced one.
      name: the call that made it.
    """

    due: Callable[[Step], bool | jax.Array]
    name: str

    def __call__(self, step: Step) -> bool | jax.Array:
        """Returns whether workers synchronise after local update `step`."""
        return self.due(step)

    def steps(self, until: int) -> list[int]:
        """Returns the synchronisation indices up to and including `until`."""
        return [t for t in range(1, until + 1) if self.due(t)]

    def gap(self, until: int) -> int:
        """Returns the longest round up to T = `until`, which ends the last one.

            gap(I) = maxᵢ (pᵢ − pᵢ₋₁),   p₀ = 0, I ∪ {T} = {p₁ < p₂ < …}

        References:
          Stich 2019, Definition 2.1.
        """
        ends = [0, *self.steps(until), until]
        return max(end - start for start, end in itertools.pairwise(ends))

    def __repr__(self) -> str:
        """Returns the call that made this schedule."""
        return self.name


def every(h: int) -> Schedule:
    """Synchronises after local updates h, 2h, 3h and so on.

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
    h = checks.integer("every(h)", "h", h, 1)
    return Schedule(lambda t: (t > 0) & (t % h == 0), f"every({h})")


def never() -> Schedule:
    """Never synchronises: one-shot averaging, by the average that ends a run.

        I = ∅

    Returns:
      A schedule. `train` synchronises once, after the last step.

    Example:
      >>> never().steps(1000), never().gap(1000)
      ([], 1000)

    References:
      Stich 2019, section 2: I_T = {T}.
    """
    return Schedule(lambda t: (t > 0) & (t < 0), "never()")


def at(steps: Iterable[int]) -> Schedule:
    """Synchronises after the given local updates and no others.

        I = {p₁ < p₂ < … < pₙ}

    Args:
      steps: positive ints, in any order.

    Returns:
      A schedule.

    Raises:
      TypeError: if one of them is not an int.
      ValueError: if there are none, or one is below 1.

    Example:
      >>> at([2, 3, 7]).steps(10), at([2, 3, 7]).gap(7)
      ([2, 3, 7], 4)

    References:
      Stich 2019, Definition 2.1.
    """
    known = frozenset(checks.integer("at(steps)", "each step", t, 1) for t in steps)
    if not known:
        raise ValueError("at(steps): at least one step is needed, got none")
    return Schedule(lambda t: _among(t, known), f"at({sorted(known)})")


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
    switch = checks.integer("post_local(switch, h)", "switch", switch, 0)
    h = checks.integer("post_local(switch, h)", "h", h, 1)

    def due(t: Step) -> bool | jax.Array:
        return (t > 0) & ((t <= switch) | ((t - switch) % h == 0))

    return Schedule(due, f"post_local({switch}, {h})")


def growing(h: int, rounds: int = 1, factor: int = 2) -> Schedule:
    """Lengthens the period from 1 to h: communicates much early and little later.

    Round r = 0, 1, … has

        Hᵣ = min(h, factor^⌊r / rounds⌋)

    Args:
      h: period in the end, at least 1.
      rounds: rounds before each lengthening, at least 1.
      factor: how much longer a round gets, at least 2.

    Returns:
      A schedule. `growing(1)` equals `every(1)`.

    Raises:
      TypeError: if an argument is not an int.
      ValueError: if one is below its least value.

    Example:
      >>> growing(8).steps(40)
      [1, 3, 7, 15, 23, 31, 39]

    References:
      Zhang, De Sa, Mitliagkas, Ré, Parallel SGD: When Does Averaging Help?, 2016.
      arXiv:1606.07365. Stich 2019 advises it where T is unknown.
    """
    h = checks.integer("growing(h)", "h", h, 1)
    rounds = checks.integer("growing(rounds)", "rounds", rounds, 1)
    factor = checks.integer("growing(factor)", "factor", factor, 2)
    early, period = [0], 1
    while period < h:
        early += [early[-1] + period * i for i in range(1, rounds + 1)]
        period *= factor
    warm, early = early[-1], frozenset(early[1:])

    def due(t: Step) -> bool | jax.Array:
        return _among(t, early) | ((t > warm) & ((t - warm) % h == 0))

    return Schedule(due, f"growing({h}, {rounds}, {factor})")


def spread(h: int, n: int) -> Schedule:
    """Synchronises n times in every h steps, as evenly as whole steps allow.

        I = {ch + ⌊(p + 1)h/n⌋ : c = 0, 1, …, p = 0, …, n − 1}

    Fragment p of `fragment(rule, n)` has its turn every h steps exactly, whether n
    divides h or not. `spread(h, 1)` equals `every(h)`.

    Args:
      h: period of a fragment in local steps.
      n: fragments, at most h.

    Returns:
      A schedule.

    Raises:
      TypeError: if an argument is not an int.
      ValueError: if one is below 1, or n above h.

    Example:
      >>> spread(10, 4).steps(20)
      [2, 5, 7, 10, 12, 15, 17, 20]

    References:
      Douillard et al., Streaming DiLoCo with overlapping communication, 2025, section
      2.2. arXiv:2501.18512
    """
    h = checks.integer("spread(h, n)", "h", h, 1)
    n = checks.integer("spread(h, n)", "n", n, 1)
    if n > h:
        raise ValueError(f"spread(h, n): n must be at most h, got n = {n} and h = {h}")

    # t = ⌊mh/n⌋ for a whole m if one lies in [tn/h, (t + 1)n/h): if their ⌈·⌉ differ.
    def due(t: Step) -> bool | jax.Array:
        return (t > 0) & ((t * n + n - 1) // h > (t * n - 1) // h)

    return Schedule(due, f"spread({h}, {n})")


def early(schedule: Schedule, tau: int) -> Schedule:
    """Synchronises τ steps before each index of a schedule, and at it.

        I = {s − τ, s : s ∈ J}

    For `delay(rule)`: snapshots are taken early and agreed on when J says so.

    Args:
      schedule: J.
      tau: τ, below the least number of steps between two indices of J.

    Returns:
      A schedule.

    Raises:
      TypeError: if an argument is not what it must be.
      ValueError: if τ is below 1 or not smaller than the spacing, which is looked at
        over the first thousand steps.

    Example:
      >>> early(every(6), 2).steps(12)
      [4, 6, 10, 12]

    References:
      Douillard et al., Streaming DiLoCo with overlapping communication, 2025, section
      2.3. arXiv:2501.18512
    """
    tau = _check_delay("early", schedule, tau)
    return Schedule(
        lambda t: schedule(t) | ((t > 0) & schedule(t + tau)),
        f"early({schedule!r}, {tau})",
    )


def late(schedule: Schedule, tau: int) -> Schedule:
    """Synchronises at each index of a schedule, and τ steps after it.

        I = {s, s + τ : s ∈ J}

    For `delay(rule)`: snapshots are taken when J says so and agreed on late.

    Args:
      schedule: J.
      tau: τ, below the least number of steps between two indices of J.

    Returns:
      A schedule.

    Raises:
      TypeError: if an argument is not what it must be.
      ValueError: if τ is below 1 or not smaller than the spacing, which is looked at
        over the first thousand steps.

    Example:
      >>> late(every(6), 2).steps(14)
      [6, 8, 12, 14]
    """
    tau = _check_delay("late", schedule, tau)
    return Schedule(
        lambda t: schedule(t) | ((t > tau) & schedule(t - tau)),
        f"late({schedule!r}, {tau})",
    )


def quadratic(
    lr_schedule: Callable[[Step], float | jax.Array], alpha: float, h_base: int
) -> Schedule:
    """Lengthens the period as the learning rate falls (QSR).

    The round that starts after t local updates has

        H = max(h_base, ⌊(alpha / η(t))²⌋)

    steps, decided at its start. A traced step replays all rounds from the first, which
    costs one evaluation of η per round so far; `train` asks with Python ints, for which
    the rounds are remembered. Where η is 0 the round has no end: let a warm-up start
    above it.

    Args:
      lr_schedule: η, from the count of local updates to the learning rate, such as an
        optax schedule.
      alpha: growth coefficient, positive.
      h_base: least period, at least 1.

    Returns:
      A schedule. A constant η ≥ alpha gives `every(h_base)`.

    Raises:
      TypeError: if lr_schedule is not callable or h_base not an int.
      ValueError: if alpha is not positive or h_base < 1.

    Example:
      >>> import optax
      >>> halved = optax.piecewise_constant_schedule(0.2, {8: 0.5})
      >>> quadratic(halved, alpha=0.3, h_base=4).steps(30)
      [4, 8, 17, 26]

    References:
      Gu, Lyu, Arora, Zhang, Huang, A Quadratic Synchronization Rule for Distributed
      Deep Learning, 2024. arXiv:2310.14423
    """
    if not callable(lr_schedule):
        raise TypeError(f"quadratic(lr_schedule, ...): not callable: {lr_schedule!r}")
    if not alpha > 0:
        raise ValueError(f"quadratic(alpha): alpha must be positive, got {alpha}")
    h_base = checks.integer("quadratic(h_base)", "h_base", h_base, 1)

    def period(t: Step) -> jax.Array:
        ratio = alpha / jnp.asarray(lr_schedule(t), jnp.float32)
        # The slack keeps a ratio that is whole on paper whole in float32, so that
        # Python ints and traced ints agree; the cap keeps the sum below in int32.
        length = jnp.clip(jnp.floor(ratio**2 * (1 + 1e-6)), h_base, 2.0**29)
        return jnp.where(ratio > 0, length, 2.0**29).astype(jnp.int32)

    ends = [0]

    def due_int(t: int) -> bool:
        with jax.ensure_compile_time_eval():
            while ends[-1] < t:
                ends.append(ends[-1] + int(period(ends[-1])))
        return t > 0 and ends[bisect.bisect_left(ends, t)] == t

    def due_traced(t: jax.Array) -> jax.Array:
        def longer(end: jax.Array) -> jax.Array:
            return end + period(end)

        end = jax.lax.while_loop(lambda end: end < t, longer, jnp.zeros_like(t))
        return (t > 0) & (end == t)

    def due(t: Step) -> bool | jax.Array:
        return due_traced(t) if isinstance(t, jax.Array) else due_int(t)

    return Schedule(due, f"quadratic(…, {alpha}, {h_base})")


def _check_delay(call: str, schedule: Schedule, tau: int) -> int:
    """Refuses a delay that is not smaller than the spacing."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{call}(schedule): a schedule is needed, got {schedule!r}")
    tau = checks.integer(f"{call}(tau)", "tau", tau, 1)
    steps = [0, *schedule.steps(1000)]
    spacing = min((b - a for a, b in itertools.pairwise(steps)), default=tau + 1)
    if tau >= spacing:
        raise ValueError(
            f"{call}(schedule, tau): tau must be smaller than the {spacing} steps "
            f"between two indices of {schedule!r}, got {tau}"
        )
    return tau


def _among(t: Step, known: frozenset[int]) -> bool | jax.Array:
    """Returns whether t is one of the known steps."""
    if isinstance(t, jax.Array):
        return jnp.any(t == jnp.array(sorted(known), dtype=t.dtype))
    return t in known
