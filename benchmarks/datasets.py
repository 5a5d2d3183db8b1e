"""Datasets of the measurements: MNIST, and two texts as bytes."""

import os
import pydoc_data.topics
from pathlib import Path
from typing import NamedTuple

import numpy as np

MNIST_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
MNIST_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
    "input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
HELD_OUT_BYTES = 65_536


class LabelledImages(NamedTuple):
    """Images, float32 in [0, 1], `(n, 784)`, and their labels, int32, `(n,)`."""

    images: np.ndarray
    labels: np.ndarray


def load_mnist() -> tuple[LabelledImages, LabelledImages]:
    """Returns training and test images, from LOCALSGD_DATA or downloaded once."""
    with np.load(_data_file("mnist.npz", MNIST_URL, MNIST_SHA256)) as file:
        train, test = (
            LabelledImages(
                file[f"x_{part}"].reshape(-1, 784).astype(np.float32) / 255,
                file[f"y_{part}"].astype(np.int32),
            )
            for part in ("train", "test")
        )
    return train, test


class ByteWindows:
    """Windows over the bytes of a text; the last 64 KiB are held out."""

    def __init__(self, text: bytes, length: int) -> None:
        """Keeps the text; a window has `length` bytes and the one after them."""
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

    def sample_in_parts(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Samples one training window from each of equal parts of the text."""
        part = (self.num_train - self.length - 1) // count
        return self.windows(np.arange(count) * part + rng.integers(0, part, count))

    def held_out(self, count: int, spacing: int) -> np.ndarray:
        """Returns held-out windows at a fixed spacing."""
        return self.windows(self.num_train + np.arange(count) * spacing)


class HelpTopics(ByteWindows):
    """Windows over the help topics of Python."""

    def __init__(self, length: int) -> None:
        """Loads the text."""
        topics = pydoc_data.topics.topics
        text = "".join(topics[name] for name in sorted(topics))
        super().__init__(text.encode(), length)


class Shakespeare(ByteWindows):
    """Windows over a megabyte of Shakespeare's plays."""

    def __init__(self, length: int) -> None:
        """Loads the text from LOCALSGD_DATA, or downloads it once."""
        super().__init__(
            _data_file(
                "tinyshakespeare.txt", SHAKESPEARE_URL, SHAKESPEARE_SHA256
            ).read_bytes(),
            length,
        )


def _data_file(name: str, url: str, sha256: str) -> Path:
    """Returns a file of LOCALSGD_DATA, or a download that is kept."""
    path = Path(os.environ.get("LOCALSGD_DATA", ""), name)
    if not path.exists():
        import pooch

        path = Path(pooch.retrieve(url, f"sha256:{sha256}", name))
    return path
