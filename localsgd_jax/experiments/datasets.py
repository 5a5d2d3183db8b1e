"""Data sets of two classes: by name, from a file, or out of a dependency's wheel."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch
from scipy.sparse import csr_matrix

from localsgd_jax.experiments.libsvm import read_libsvm

SITE = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/"
KNOWN = {
    "a9a": "7ba53cccb27e2e525f0fb173e1f446d49856e3fb007eb43be4ec6d0f5b3335ca",
    "w8a": "b464b4f6ce6a5d9e181ffc793e19a04751036273722312398ef7673705014902",
}
LARGEST = 4 * 2**30


class Dataset(NamedTuple):
    """Examples of two classes.

    Attributes:
      name: what to call it.
      features: float64, sparse, `(n, d)`.
      labels: -1 or +1, float64, `(n,)`.
      sha256: of the file that it came from, or None.
    """

    name: str
    features: csr_matrix
    labels: np.ndarray
    sha256: str | None = None

    @property
    def examples(self) -> int:
        """Returns n."""
        return len(self.labels)

    @property
    def dimension(self) -> int:
        """Returns d."""
        return self.features.shape[1]  # pyright: ignore[reportOptionalSubscript]


def load(data: str) -> Dataset:
    """Loads a known data set by its name, or any file in LIBSVM format.

    Args:
      data: a name in `KNOWN`, which wins over a file of that name (write ./w8a for
        the file), or a path.

    Returns:
      The data set. The smaller label becomes -1, the larger one +1.

    Raises:
      ValueError: if it is neither, or the file is not what it must be.
      OSError: if the file cannot be read or fetched.
    """
    path = fetch(data) if data in KNOWN else Path(data)
    if not path.exists():
        raise FileNotFoundError(
            f"no file {data!r}, and no data set known by that name; known are: "
            + ", ".join(KNOWN)
        )
    features, labels = read_libsvm(path)
    dataset = Dataset(
        path.stem, features, two_classes(path, labels), pooch.file_hash(str(path))
    )
    _check_size(path, dataset)
    return dataset


def fetch(name: str) -> Path:
    """Returns the file of a known data set, downloaded once if it must be.

    Looks into the directory named by LOCALSGD_DATA, then into the cache, then on the
    LIBSVM site; everywhere the sha256 must be right.

    Args:
      name: a name in `KNOWN`.

    Returns:
      The path of the file.

    Raises:
      ValueError: if the file in LOCALSGD_DATA has another sha256.
      OSError: if the file cannot be downloaded, or not unharmed.
    """
    if given := os.environ.get("LOCALSGD_DATA"):
        if not Path(given).is_dir():
            raise NotADirectoryError(f"LOCALSGD_DATA: no directory {given!r}")
        if (path := Path(given, name)).exists():
            return _checked(path, KNOWN[name])
    cache = pooch.os_cache("localsgd_jax")
    pooch.get_logger().setLevel("WARNING")
    try:
        found = pooch.retrieve(SITE + name, f"sha256:{KNOWN[name]}", name, cache)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{SITE}{name} cannot be downloaded ({_reason(error)}); fetch it in "
            f"another way and put it at {cache / name}, or into a directory that the "
            f"environment variable LOCALSGD_DATA names; its sha256 is {KNOWN[name]}"
        ) from None
    return Path(found)


def digits() -> Dataset:
    """Returns the handwritten digits of scikit-learn, odd against even.

    1797 images of 8 x 8 pixels, each pixel standardised. They are part of the wheel:
    nothing is downloaded.

    Returns:
      The data set.

    Example:
      >>> digits().features.shape
      (1797, 64)
    """
    from sklearn.datasets import load_digits
    from sklearn.preprocessing import StandardScaler

    images, numbers = load_digits(return_X_y=True)
    features = csr_matrix(StandardScaler().fit_transform(images))
    return Dataset("digits (odd or even)", features, 2.0 * (numbers % 2) - 1)


def two_classes(source: Path | str, labels: np.ndarray) -> np.ndarray:
    """Turns two labels into -1 and +1, in their order.

    Args:
      source: where they come from, for the message.
      labels: `(n,)`.

    Returns:
      -1.0 and +1.0, `(n,)`.

    Raises:
      ValueError: if the labels are not of exactly two classes.

    Example:
      >>> two_classes("here", np.array([2.0, 1.0, 2.0]))
      array([ 1., -1.,  1.])
    """
    found = np.unique(labels)
    if len(found) != 2:
        shown = ", ".join(f"{label:g}" for label in found[:8])
        more = ", ..." if len(found) > 8 else ""
        raise ValueError(
            f"{source}: the labels must be of two classes, got {len(found)}: "
            f"{shown}{more}"
        )
    return np.where(labels == found[1], 1.0, -1.0)


def _checked(path: Path, sha256: str) -> Path:
    """Returns the path if the file has the right hash."""
    if (got := pooch.file_hash(str(path))) != sha256:
        raise ValueError(f"{path}: its sha256 must be {sha256}, got {got}")
    return path


def _check_size(path: Path, dataset: Dataset) -> None:
    """Refuses what would be too large as a dense matrix."""
    if (needed := 4 * dataset.examples * dataset.dimension) > LARGEST:
        raise ValueError(
            f"{path}: {dataset.examples} examples of {dataset.dimension} features "
            f"take {needed / 2**30:.1f} GiB as a dense matrix, and at most "
            f"{LARGEST / 2**30:.0f} GiB are allowed"
        )


def _reason(error: Exception) -> str:
    """Returns the innermost reason of an error, in one line."""
    inner = error.__cause__ or error.__context__
    if isinstance(inner, Exception):
        return _reason(inner)
    return " ".join(str(error).split())
