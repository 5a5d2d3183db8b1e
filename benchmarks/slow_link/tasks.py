"""What is trained over the links: the MLP on digits, the GPT on text, as NumPy data."""

import os
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MNIST = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"


class Task(NamedTuple):
    """A model and its data.

    Attributes:
      draw: `draw(rng, count)`, a batch of training examples.
      held_out: a batch.
      batch: b, examples of a worker and step.
      rate: learning rate of AdamW.
    """

    draw: Callable[[np.random.Generator, int], Any]
    held_out: Any
    batch: int
    rate: float


def mlp() -> Task:
    """MNIST, one number for each pixel."""
    path = Path(os.environ.get("LOCALSGD_DATA", ""), "mnist.npz")
    if not path.exists():
        import pooch

        path = Path(pooch.retrieve(MNIST, f"sha256:{SHA256}", "mnist.npz"))
    with np.load(path) as file:
        pixels, test = (
            file[f"x_{part}"].reshape(-1, 784).astype(np.float32) / 255
            for part in ("train", "test")
        )
        digits, answers = (
            np.eye(10, dtype=np.float32)[file[f"y_{part}"]]
            for part in ("train", "test")
        )

    def draw(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.integers(0, len(pixels), count)
        return pixels[chosen], digits[chosen]

    held_out = test[:2000], answers[:2000]
    return Task(draw, held_out, batch=32, rate=1e-3)


def gpt(length: int = 64) -> Task:
    """The help topics that come with Python, byte by byte."""
    topics = pydoc_data.topics.topics
    text = "".join(topics[name] for name in sorted(topics)).encode()
    data = np.frombuffer(text, np.uint8)
    cut = len(data) - 65_536

    def windows(starts: np.ndarray) -> np.ndarray:
        return data[starts[:, None] + np.arange(length + 1)].astype(np.int32)

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        return windows(rng.integers(0, cut - length - 1, count))

    held_out = windows(cut + np.arange(64) * 1000)
    return Task(draw, held_out, batch=2, rate=1e-3)


TASKS = {"mlp": mlp, "gpt": gpt}
STEPS = {"mlp": 512, "gpt": 192}
TARGETS = {"mlp": 0.2, "gpt": 3.08}  # Held-out losses that count as trained.


def batches(task: Task, worker: int, workers: int, steps: int) -> Any:
    """Draws what one worker sees: leaves (T, b, ...), another stream for each."""
    rng = np.random.default_rng([0, worker, workers])
    drawn = task.draw(rng, steps * task.batch)
    if isinstance(drawn, tuple):
        return tuple(x.reshape(steps, task.batch, *x.shape[1:]) for x in drawn)
    return drawn.reshape(steps, task.batch, *drawn.shape[1:])


def sizes(tiny: bool) -> tuple[int, ...]:
    """Bytes of the all-reduces that measure a link."""
    return (1 << 12, 1 << 14, 1 << 16) if tiny else (1 << 16, 1 << 19, 1 << 22)
