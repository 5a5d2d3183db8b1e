"""Datasets of the measurements: MNIST, and the help topics of Python as bytes."""

import os
import pydoc_data.topics
from pathlib import Path
from typing import NamedTuple

import numpy as np

MNIST_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
MNIST_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
HELD_OUT_BYTES = 65_536


class LabelledImages(NamedTuple):
    """Images, float32 in [0, 1], `(n, 784)`, and their labels, int32, `(n,)`."""

    images: np.ndarray
    labels: np.ndarray


def load_mnist() -> tuple[LabelledImages, LabelledImages]:
    """Returns training and test images, from LOCALSGD_DATA or downloaded once."""
    path = Path(os.environ.get("LOCALSGD_DATA", ""), "mnist.npz")
    if not path.exists():
        import pooch

        path = Path(pooch.retrieve(MNIST_URL, f"sha256:{MNIST_SHA256}", "mnist.npz"))
    with np.load(path) as file:
        train, test = (
            LabelledImages(
                file[f"x_{part}"].reshape(-1, 784).astype(np.float32) / 255,
                file[f"y_{part}"].astype(np.int32),
            )
            for part in ("train", "test")
        )
    return train, test


class HelpTopics:
    """Windows over the help topics of Python; the last 64 KiB are held out."""

    def __init__(self, length: int) -> None:
        """Loads the text; a window has `length` bytes and the one after them."""
        topics = pydoc_data.topics.topics
        text = "".join(topics[name] for name in sorted(topics)).encode()
        self.bytes, self.length = np.frombuffer(text, np.uint8), length
        self.num_held_out = HELD_OUT_BYTES
        self.num_train = len(self.bytes) - self.num_held_out

    def windows(self, starts: np.ndarray) -> np.ndarray:
        """Returns the windows at some positions, int32, `(n, length + 1)`."""
        positions = starts[:, None] + np.arange(self.length + 1)
        return self.bytes[positions].astype(np.int32)

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Samples training windows."""
        starts = rng.integers(0, self.num_train - self.length - 1, count)
        return self.windows(starts)

    def held_out(self, count: int, spacing: int) -> np.ndarray:
        """Returns held-out windows at a fixed spacing."""
        return self.windows(self.num_train + np.arange(count) * spacing)
