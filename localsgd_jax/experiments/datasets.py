"""Binary classification datasets: registered downloads, LIBSVM files and digits."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch
from scipy.sparse import csr_matrix

from localsgd_jax.experiments.libsvm import read_libsvm

BASE_URL = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/"
REGISTRY = {
    "a9a": "7ba53cccb27e2e525f0fb173e1f446d49856e3fb007eb43be4ec6d0f5b3335ca",
    "w8a": "b464b4f6ce6a5d9e181ffc793e19a04751036273722312398ef7673705014902",
}
MAX_DENSE_BYTES = 4 * 2**30
_MAX_LABELS_SHOWN = 8


class Dataset(NamedTuple):
    """Examples of a binary classification problem.

    Attributes:
      name: display name.
      features: float64, sparse, `(n, d)`.
      labels: -1 or +1, float64, `(n,)`.
      sha256: hash of the source file, or None.
    """

    name: str
    features: csr_matrix
    labels: np.ndarray
    sha256: str | None = None

    @property
    def examples(self) -> int:
        """Returns the number of examples n."""
        return len(self.labels)

    @property
    def dimension(self) -> int:
        """Returns the number of features d."""
        return self.features.shape[1]  # pyright: ignore[reportOptionalSubscript]


def load(data: str) -> Dataset:
    """Loads a registered dataset by name, or a file in LIBSVM format.

    Args:
      data: a name in `REGISTRY`, which takes precedence over a file of that name (write
        ./w8a for the file), or a path.

    Returns:
      The dataset. The smaller label becomes -1, the larger one +1.

    Raises:
      ValueError: if the file is invalid or too large.
      OSError: if the file does not exist or cannot be read or downloaded.
    """
    check_exists(data)
    path = fetch(data) if data in REGISTRY else Path(data)
    features, labels = read_libsvm(path)
    dataset = Dataset(
        path.stem, features, to_binary_labels(path, labels), pooch.file_hash(str(path))
    )
    _check_size(path, dataset)
    return dataset


def check_exists(data: str) -> None:
    """Raises unless there is a registered dataset or a file.

    Args:
      data: as for `load`.

    Raises:
      FileNotFoundError: if there is neither.
    """
    if data not in REGISTRY and not (data and Path(data).exists()):
        raise FileNotFoundError(
            f"no file {data!r} and no registered dataset of that name; registered: "
            + ", ".join(REGISTRY)
        )


def fetch(name: str) -> Path:
    """Returns the file of a registered dataset, downloading it if necessary.

    Searches the directory in the environment variable LOCALSGD_DATA, then the cache,
    then downloads from the LIBSVM site. The sha256 is verified in each case.

    Args:
      name: a name in `REGISTRY`.

    Returns:
      The path of the file.

    Raises:
      ValueError: if the file in LOCALSGD_DATA has another sha256.
      OSError: if LOCALSGD_DATA is no directory, the download fails or it has another
        sha256.
    """
    if directory := os.environ.get("LOCALSGD_DATA"):
        if not Path(directory).is_dir():
            raise NotADirectoryError(f"LOCALSGD_DATA: no directory {directory!r}")
        if (path := Path(directory, name)).exists():
            return _verify_sha256(path, REGISTRY[name])
    cache = pooch.os_cache("localsgd_jax")
    pooch.get_logger().setLevel("WARNING")
    try:
        path = pooch.retrieve(BASE_URL + name, f"sha256:{REGISTRY[name]}", name, cache)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{BASE_URL}{name} cannot be downloaded ({_root_cause(error)}); fetch it "
            f"in another way and put it at {cache / name}, or into the directory named "
            "by the environment variable LOCALSGD_DATA; its sha256 is "
            f"{REGISTRY[name]}"
        ) from None
    return Path(path)


def digits() -> Dataset:
    """Returns the handwritten digits of scikit-learn, odd against even.

    1797 images of 8 x 8 pixels, each pixel standardised. They are part of the
    scikit-learn wheel, so nothing is downloaded.

    Returns:
      The dataset.

    Example:
      >>> digits().features.shape
      (1797, 64)
    """
    from sklearn.datasets import load_digits
    from sklearn.preprocessing import StandardScaler

    images, numbers = load_digits(return_X_y=True)
    features = csr_matrix(StandardScaler().fit_transform(images))
    return Dataset("digits (odd or even)", features, 2.0 * (numbers % 2) - 1)


def to_binary_labels(source: Path | str, labels: np.ndarray) -> np.ndarray:
    """Maps the smaller of two labels to -1 and the larger one to +1.

    Args:
      source: prefix of the error message.
      labels: `(n,)`.

    Returns:
      -1.0 and +1.0, `(n,)`.

    Raises:
      ValueError: if there are not exactly two distinct labels.

    Example:
      >>> to_binary_labels("data.txt", np.array([2.0, 1.0, 2.0]))
      array([ 1., -1.,  1.])
    """
    distinct = np.unique(labels)
    if len(distinct) != 2:
        listed = ", ".join(f"{label:g}" for label in distinct[:_MAX_LABELS_SHOWN])
        more = ", ..." if len(distinct) > _MAX_LABELS_SHOWN else ""
        raise ValueError(
            f"{source}: the labels must be of two classes, got {len(distinct)}: "
            f"{listed}{more}"
        )
    return np.where(labels == distinct[1], 1.0, -1.0)


def _verify_sha256(path: Path, sha256: str) -> Path:
    """Returns the path; raises if the file has another hash."""
    if (actual := pooch.file_hash(str(path))) != sha256:
        raise ValueError(f"{path}: sha256 must be {sha256}, got {actual}")
    return path


def _check_size(path: Path, dataset: Dataset) -> None:
    """Raises if the dense float32 matrix would be too large."""
    if (size := 4 * dataset.examples * dataset.dimension) > MAX_DENSE_BYTES:
        raise ValueError(
            f"{path}: the dense matrix of {dataset.examples} examples with "
            f"{dataset.dimension} features must have at most "
            f"{MAX_DENSE_BYTES / 2**30:.0f} GiB, got {size / 2**30:.1f} GiB"
        )


def _root_cause(error: Exception) -> str:
    """Returns the message of the innermost error, in one line."""
    inner = error.__cause__ or error.__context__
    if isinstance(inner, Exception):
        return _root_cause(inner)
    return " ".join(str(error).split())
