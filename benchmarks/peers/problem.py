"""What every contestant is given: a model, its batches, H and the step sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import models

WORKERS, PERIOD = 2, 16


class Problem(NamedTuple):
    """T = R H steps of two workers.

    Attributes:
      name: of the model.
      loss: `loss(params, batch)`.
      params: to start from, NumPy.
      batches: leaves (T, K, B, ...), NumPy.
      period: H.
      rate: step size of the inner SGD.
    """

    name: str
    loss: Callable
    params: Any
    batches: tuple
    period: int
    rate: float

    @property
    def steps(self) -> int:
        return len(self.batches[0])

    @property
    def rounds(self) -> int:
        return self.steps // self.period


NAMES = ("logistic", "small mlp", "mlp")


def make(name: str, tiny: bool = False) -> Problem:
    """Returns the problem of that name, or one of its kind that takes no time.

    Few steps: float32 rounds apart what passes the kinks of a perceptron often.
    """
    if name == "logistic":
        model, rounds, rate = models.logistic(8 if tiny else 300), 16, 0.1
    else:
        width, rounds = {"small mlp": (64, 4), "mlp": (672, 4)}[name]
        model, rate = models.mlp(8 if tiny else width), 0.05
    return _problem(model._replace(name=name), 2 if tiny else rounds, rate)


def _problem(model: models.Model, rounds: int, rate: float) -> Problem:
    """Draws batches; a label is what a fixed linear map of the example says."""
    rng = np.random.default_rng(1)
    inputs, labels = model.batch
    x = rng.normal(size=(rounds * PERIOD, WORKERS, *inputs.shape)).astype(np.float32)
    truth = rng.normal(size=(inputs.shape[-1], *labels.shape[1:])).astype(np.float32)
    if labels.ndim == 1:
        y = np.sign(x @ truth).astype(np.float32)
    else:
        y = np.eye(labels.shape[-1], dtype=np.float32)[(x @ truth).argmax(-1)]
    return Problem(model.name, model.loss, model.params, (x, y), PERIOD, rate)


def save(problem: Problem, folder: Path) -> None:
    """Writes what workers in processes of their own read."""
    x, y = problem.batches
    leaves = jax.tree.leaves(problem.params)
    arrays = {f"params{i}": leaf for i, leaf in enumerate(leaves)}
    np.savez(folder / "problem.npz", x=x, y=y, leaves=len(leaves), **arrays)
