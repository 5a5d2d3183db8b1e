"""Training tasks of the measurement: an MLP on MNIST and a byte-level GPT on text."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.datasets import HelpTopics, load_mnist


class Task(NamedTuple):
    """Data and hyperparameters of a model.

    Attributes:
      sample: `sample(rng, count) -> batch`; samples training examples.
      held_out: batch for the evaluation.
      batch: B, examples per worker and step.
      learning_rate: of AdamW.
    """

    sample: Callable[[np.random.Generator, int], Any]
    held_out: Any
    batch: int
    learning_rate: float


def mlp() -> Task:
    """Returns MNIST with flat images, `(n, 784)`, and one-hot labels, `(n, 10)`."""
    train, test = load_mnist()
    one_hot = np.eye(10, dtype=np.float32)

    def sample(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        indices = rng.integers(0, len(train.images), count)
        return train.images[indices], one_hot[train.labels[indices]]

    held_out = test.images[:2000], one_hot[test.labels[:2000]]
    return Task(sample, held_out, batch=32, learning_rate=1e-3)


def gpt(length: int = 64) -> Task:
    """Returns windows of bytes, `(n, length + 1)`, of the help topics of Python."""
    topics = HelpTopics(length)
    held_out = topics.held_out(64, spacing=1000)
    return Task(topics.sample, held_out, batch=2, learning_rate=1e-3)


TASKS = {"mlp": mlp, "gpt": gpt}
STEPS = {"mlp": 512, "gpt": 192}
TARGET_LOSSES = {"mlp": 0.2, "gpt": 3.08}


def batches(task: Task, worker: int, workers: int, steps: int) -> Any:
    """Samples the batches of one worker.

    Args:
      task: the task.
      worker: index of the worker; each has a random stream of its own.
      workers: K.
      steps: T.

    Returns:
      Leaves `(T, B, ...)`.
    """
    rng = np.random.default_rng([0, worker, workers])
    examples = task.sample(rng, steps * task.batch)
    if isinstance(examples, tuple):
        return tuple(x.reshape(steps, task.batch, *x.shape[1:]) for x in examples)
    return examples.reshape(steps, task.batch, *examples.shape[1:])


def all_reduce_sizes(tiny: bool) -> tuple[int, ...]:
    """Returns the bytes of the all-reduces that measure a link."""
    return (1 << 12, 1 << 14, 1 << 16) if tiny else (1 << 16, 1 << 19, 1 << 22)
