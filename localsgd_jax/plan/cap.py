"""The cap that the theory puts on the period: its constants given, or measured."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from localsgd_jax import theory
from localsgd_jax.base import Cluster, PyTree, State
from localsgd_jax.consensus import consensus

POINTS, STRIDE = 5, 16


class Cap(NamedTuple):
    """What the theory says of the period.

    Attributes:
      constants: of the problem.
      measured: whether they were, or were given.
      longest: period that keeps the linear speedup; None if the theory knows of none.
    """

    constants: theory.Constants
    measured: bool
    longest: int | None


def cap(constants: theory.Constants, measured: bool, run: theory.Run) -> Cap:
    """Caps the period, if the loss is strongly convex.

        max {H : H ≤ longest_period(shift(H))}

    with the least shift of the stepsize that the period allows.

    Args:
      constants: of the problem.
      measured: whether they were.
      run: whose period is not used.

    Returns:
      The cap.

    Raises:
      ValueError: if given constants are impossible.
    """
    if measured and constants.mu <= 0:
        return Cap(constants, measured, None)

    def allowed(period: int) -> int:
        a = theory.shift(constants.mu, constants.smoothness, period)
        return theory.longest_period(constants, run, a)

    # What is allowed grows with the shift: from above this ends at the largest.
    period = run.steps
    while (shorter := allowed(period)) < period:
        period = shorter
    return Cap(constants, measured, period)


def measure_constants(
    cluster: Cluster,
    state: State,
    batch: PyTree,
    loss: Callable,
    examples: PyTree | None = None,
    mu: float | None = None,
) -> theory.Constants:
    """Measures μ, L, σ² and G² along a short run of the cluster's own steps.

    Args:
      cluster, state, batch: as for `cluster.step`.
      loss: `loss(params, example)`, of a single example, with its penalty.
      examples: leaves with a leading axis n; those of the batch if None.
      mu: μ if it is known, such as the penalty.

    Returns:
      The constants: the extremes over the means of the workers at a few steps, with a μ
      of at most 0 if the loss is not known to be strongly convex there.
    """
    if examples is None:
        examples = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    path = [jax.device_get(point) for point in path_of(cluster, state, batch)]
    examples = jax.device_get(examples)
    least, smoothness = theory.curvature(loss, examples, path)
    # σ² and G² do not depend on μ, and are worth knowing also if it is below 0.
    moments = theory.estimate(loss, examples, path, mu=1.0, smoothness=1.0)
    return moments._replace(mu=least if mu is None else mu, smoothness=smoothness)


def path_of(cluster: Cluster, state: State, batch: PyTree) -> Iterator[PyTree]:
    """Takes some local steps, and shows the mean of the workers on the way.

    Args:
      cluster, state, batch: as for `cluster.step`.

    Yields:
      Parameters, first those of the state.
    """
    step = jax.jit(cluster.step)
    yield consensus(state)
    for _ in range(POINTS - 1):
        for _ in range(STRIDE):
            state, _ = step(state, batch)
        yield consensus(state)
