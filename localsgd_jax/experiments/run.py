"""One run of Local SGD on a logistic regression, watched by f − f*."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import localsgd_jax as lsgd
from localsgd_jax.experiments import logistic
from localsgd_jax.experiments.datasets import Dataset

LOOKS = 100


class Problem(NamedTuple):
    """What is minimised.

    Attributes:
      dataset: the examples.
      minimum: f*.
    """

    dataset: Dataset
    minimum: float


class Plan(NamedTuple):
    """How it is minimised.

    Attributes:
      mesh: the devices.
      workers: K.
      schedule: when workers agree.
      optimizer: each worker's own.
      batch: B.
      steps: T.
      seed: of the shuffles.
    """

    mesh: Mesh
    workers: int
    schedule: lsgd.Schedule
    optimizer: optax.GradientTransformation
    batch: int
    steps: int
    seed: int


def run(
    problem: Problem, plan: Plan, record: Callable, advance: Callable
) -> np.ndarray:
    """Trains from x = 0 and reports every round.

    Args:
      problem: what is minimised.
      plan: how.
      record: called with a dict for the start and for each round: what `train` records,
        "gradients", the evaluations by all workers so far, and now and then
        "suboptimality", f(x̄) − f*.
      advance: called without arguments for each step that is loaded.

    Returns:
      The averaged x̄ in the end, `(d,)`.

    Raises:
      NonFiniteLossError: as `train`, also if the last step spoils the parameters.
    """
    dataset = problem.dataset
    algorithm = lsgd.local_sgd(
        logistic.loss_fn(dataset), plan.optimizer, rule=lsgd.average()
    )
    cluster = lsgd.on_mesh(algorithm, plan.mesh, workers=plan.workers)

    def suboptimality(x: jax.Array | np.ndarray) -> float:
        return logistic.value(dataset, np.asarray(x)) - problem.minimum

    def report(row: dict) -> None:
        record(row | {"gradients": row["step"] * plan.workers * plan.batch})

    start = {"step": 0, "round": 0, "bytes": 0, "seconds": 0.0}
    report(start | {"suboptimality": suboptimality(np.zeros(dataset.dimension))})
    state, history = lsgd.train(
        cluster,
        cluster.init(jnp.zeros(dataset.dimension)),
        _counted(_batches(dataset, plan), plan.steps, advance),
        every=plan.schedule,
        evaluate=lambda x: {"suboptimality": suboptimality(x)},
        evaluate_every=math.ceil(len(plan.schedule.steps(plan.steps)) / LOOKS) or 1,
        record=report,
        progress=False,
    )
    x = np.asarray(lsgd.consensus(state))
    if not np.isfinite(x).all():
        everyone = list(range(plan.workers))
        raise lsgd.NonFiniteLossError(plan.steps, everyone, history, state)
    return x


def _batches(dataset: Dataset, plan: Plan) -> Iterator:
    """Deals the examples in float32."""
    examples = (
        dataset.features.astype(np.float32).toarray(),
        dataset.labels.astype(np.float32),
    )
    return lsgd.deal(examples, plan.workers, plan.batch, seed=plan.seed)


def _counted(batches: Iterable, steps: int, advance: Callable) -> Iterator:
    """Yields so many batches and reports each."""
    for _, batch in zip(range(steps), batches, strict=False):
        advance()
        yield batch
