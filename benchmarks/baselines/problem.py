"""Problem of the comparison: a model, its batches, H and the step size."""

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
      name: name of the model.
      loss: `loss(params, batch)`.
      params: initial parameters, NumPy.
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
        """Returns T."""
        return len(self.batches[0])

    @property
    def rounds(self) -> int:
        """Returns R."""
        return self.steps // self.period


NAMES = ("logistic", "small mlp", "mlp")


def make(name: str, tiny: bool = False) -> Problem:
    """Returns a problem by its name, or a tiny one of the same kind.

    The perceptrons have few steps, since rounding decides at kinks: after many steps
    PyTorch and JAX differ.
    """
    if name == "logistic":
        model, rounds, rate = models.logistic(8 if tiny else 300), 16, 0.1
    else:
        width, rounds = {"small mlp": (64, 4), "mlp": (672, 4)}[name]
        model, rate = models.mlp(8 if tiny else width), 0.05
    return _sample_problem(model._replace(name=name), 2 if tiny else rounds, rate)


def _sample_problem(model: models.Model, rounds: int, rate: float) -> Problem:
    """Samples batches; the labels are given by a fixed linear map of the examples."""
    rng = np.random.default_rng(1)
    inputs, labels = model.batch
    x = rng.normal(size=(rounds * PERIOD, WORKERS, *inputs.shape)).astype(np.float32)
    linear = rng.normal(size=(inputs.shape[-1], *labels.shape[1:])).astype(np.float32)
    if labels.ndim == 1:
        y = np.sign(x @ linear).astype(np.float32)
    else:
        y = np.eye(labels.shape[-1], dtype=np.float32)[(x @ linear).argmax(-1)]
    return Problem(model.name, model.loss, model.params, (x, y), PERIOD, rate)


def save(problem: Problem, folder: Path) -> None:
    """Writes problem.npz, which worker processes read."""
    x, y = problem.batches
    leaves = jax.tree.leaves(problem.params)
    arrays = {f"params{i}": leaf for i, leaf in enumerate(leaves)}
    np.savez(folder / "problem.npz", x=x, y=y, leaves=len(leaves), **arrays)
