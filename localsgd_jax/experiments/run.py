"""One run of local SGD on logistic regression, with its suboptimality."""

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

NUM_EVALUATIONS = 100


class Problem(NamedTuple):
    """A logistic regression problem and its optimal value.

    Attributes:
      dataset: the examples.
      minimum: f*.
    """

    dataset: Dataset
    minimum: float


class RunConfig(NamedTuple):
    """Configuration of a run.

    Attributes:
      mesh: devices of the workers.
      workers: K.
      schedule: synchronisation schedule.
      optimizer: inner optimizer of each worker.
      batch: B, examples per worker and step.
      steps: T, local steps of each worker.
      seed: seed of the shuffles.
    """

    mesh: Mesh
    workers: int
    schedule: lsgd.Schedule
    optimizer: optax.GradientTransformation
    batch: int
    steps: int
    seed: int


def run(
    problem: Problem, config: RunConfig, on_row: Callable, on_step: Callable
) -> np.ndarray:
    """Trains from x = 0 and reports a history row per round.

    Args:
      problem: the problem.
      config: the configuration.
      on_row: called with a dict for the initial state and for each round: the columns
        of `train`, "gradients", the number of gradient evaluations of all workers so
        far, and at most 100 times "suboptimality", f(x̄) − f*.
      on_step: called without arguments for each step that is loaded.

    Returns:
      The final mean x̄, `(d,)`.

    Raises:
      NonFiniteLossError: as `train`, and if the final parameters are not finite.
    """
    dataset = problem.dataset
    algorithm = lsgd.local_sgd(logistic.loss_fn(dataset), config.optimizer)
    cluster = lsgd.on_mesh(algorithm, config.mesh, workers=config.workers)

    def suboptimality(x: jax.Array | np.ndarray) -> dict:
        error = logistic.objective(dataset, np.asarray(x)) - problem.minimum
        return {"suboptimality": error}

    def report(row: dict) -> None:
        on_row(row | {"gradients": row["step"] * config.workers * config.batch})

    initial = {"step": 0, "round": 0, "bytes": 0, "seconds": 0.0}
    report(initial | suboptimality(np.zeros(dataset.dimension)))
    rounds = len(config.schedule.steps(config.steps))
    state, history = lsgd.train(
        cluster,
        cluster.init(jnp.zeros(dataset.dimension)),
        _count_steps(_batches(dataset, config), config.steps, on_step),
        schedule=config.schedule,
        evaluate=suboptimality,
        evaluate_every=math.ceil(rounds / NUM_EVALUATIONS) or 1,
        on_round_end=report,
        progress=False,
    )
    x = np.asarray(lsgd.consensus(state))
    if not np.isfinite(x).all():
        workers = list(range(config.workers))
        raise lsgd.NonFiniteLossError(config.steps, workers, history, state)
    return x


def _batches(dataset: Dataset, config: RunConfig) -> Iterator:
    """Returns shuffled batches of float32 examples."""
    examples = (
        dataset.features.astype(np.float32).toarray(),
        dataset.labels.astype(np.float32),
    )
    return lsgd.shuffled_batches(
        examples, config.workers, config.batch, seed=config.seed
    )


def _count_steps(batches: Iterable, steps: int, on_step: Callable) -> Iterator:
    """Yields `steps` batches and calls `on_step` before each."""
    for _, batch in zip(range(steps), batches, strict=False):
        on_step()
        yield batch
