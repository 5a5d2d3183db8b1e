"""Upper bound on the period from convergence theory, given or measured constants."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from localsgd_jax import theory
from localsgd_jax.core.types import Cluster, PyTree, State
from localsgd_jax.execution.mean_model import consensus

TRAJECTORY_POINTS, STEPS_BETWEEN_POINTS = 5, 16


class PeriodBound(NamedTuple):
    """Theoretical upper bound on the period.

    Attributes:
      constants: constants of the problem.
      measured: whether the constants were measured.
      max_period: largest period with linear speedup; None if the theory does not apply.
    """

    constants: theory.Constants
    measured: bool
    max_period: int | None


def theoretical_period_bound(
    constants: theory.Constants, measured: bool, run: theory.RunParameters
) -> PeriodBound:
    """Returns the upper bound on the period for a strongly convex loss.

        max {H : H ≤ longest_period(shift(H))}

    shift(H) is the least shift of the step size that the theory allows for period H.

    Args:
      constants: constants of the problem.
      measured: whether the constants were measured. Measured constants without strong
        convexity give no bound; given ones raise.
      run: parameters of the run, of which the period is not used.

    Returns:
      The bound.

    Raises:
      ValueError: if given constants are out of range.
    """
    if measured and constants.mu <= 0:
        return PeriodBound(constants, measured, None)

    def max_period(period: int) -> int:
        shift = theory.shift(constants.mu, constants.smoothness, period)
        return theory.longest_period(constants, run, shift)

    # The allowed period increases with the shift, so the iteration from above
    # decreases to the largest fixed point.
    period = run.steps
    while (shorter := max_period(period)) < period:
        period = shorter
    return PeriodBound(constants, measured, period)


def measure_constants(
    cluster: Cluster,
    state: State,
    batch: PyTree,
    loss: Callable,
    examples: PyTree | None = None,
    mu: float | None = None,
) -> theory.Constants:
    """Estimates μ, L, σ² and G² along a short run of the cluster.

    Args:
      cluster, state, batch: as for `cluster.step`.
      loss: `loss(params, example)` of a single example, including its penalty.
      examples: leaves with a leading axis n; None for the examples of the batch.
      mu: μ if it is known, such as the penalty.

    Returns:
      The constants: extremes over the mean of the workers at a few points of the
      trajectory. μ is at most 0 if strong convexity was not found there.
    """
    if examples is None:
        examples = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    trajectory = sample_trajectory(cluster, state, batch)
    points = [jax.device_get(params) for params in trajectory]
    examples = jax.device_get(examples)
    min_curvature, smoothness = theory.curvature(loss, examples, points)
    # σ² and G² do not depend on μ, and are reported also if μ is not positive.
    moments = theory.estimate(loss, examples, points, mu=1.0, smoothness=1.0)
    return moments._replace(
        mu=min_curvature if mu is None else mu, smoothness=smoothness
    )


def sample_trajectory(
    cluster: Cluster, state: State, batch: PyTree
) -> Iterator[PyTree]:
    """Runs local steps and yields the mean of the workers at regular intervals.

    Args:
      cluster, state, batch: as for `cluster.step`.

    Yields:
      Parameters, first of `state` itself.
    """
    step = jax.jit(cluster.step)
    yield consensus(state)
    for _ in range(TRAJECTORY_POINTS - 1):
        for _ in range(STEPS_BETWEEN_POINTS):
            state, _ = step(state, batch)
        yield consensus(state)
