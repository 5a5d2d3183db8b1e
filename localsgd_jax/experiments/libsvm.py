"""LIBSVM files: read by scikit-learn, refused with the number of the bad line."""

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.datasets import load_svmlight_file

_OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_LARGEST = float(np.finfo(np.float32).max)


def read_libsvm(path: Path) -> tuple[csr_matrix, np.ndarray]:
    """Reads a file in LIBSVM format, plain or compressed (.gz, .bz2, .xz).

    Args:
      path: the file. Indices count from 1, or from 0 if index 0 occurs.

    Returns:
      The features, float64 `(n, d)`, and the labels as they stand in the file `(n,)`.

    Raises:
      ValueError: with the number of the line, if one is not in LIBSVM format or holds
        a value that float32 does not; if there are no examples or no features; if
        compressed data is damaged.
      OSError: if the file cannot be opened.
    """
    try:
        with _open(path) as file:
            features, labels = load_svmlight_file(file)
    except (ValueError, OverflowError):
        raise _blame(path) from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}: damaged or cut short: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path}: damaged or not compressed: {error}") from None
    if not _is_finite(features, labels):
        raise _blame(path)
    if not len(labels):
        raise ValueError(f"{path}: there are no examples in it")
    if not np.any(features.data.astype(np.float32)):
        raise ValueError(f"{path}: no example has a feature other than 0 in float32")
    return features, labels


def _open(path: Path) -> BinaryIO:
    """Opens a file to read its bytes, decompressed."""
    return _OPEN.get(path.suffix, open)(path, "rb")


def _is_finite(features: csr_matrix, labels: np.ndarray) -> bool:
    """Returns whether float32 can hold every value."""
    return bool(
        np.all(np.abs(features.data) <= _LARGEST) and np.all(np.isfinite(labels))
    )


def _complaint(lines: list[bytes]) -> str | None:
    """Returns what is wrong with some lines."""
    try:
        finite = _is_finite(*load_svmlight_file(io.BytesIO(b"".join(lines))))
    except (ValueError, OverflowError) as error:
        return f"not in LIBSVM format, {_short(str(error), 80)}"
    return None if finite else "a value is not finite in float32"


def _blame(path: Path) -> ValueError:
    """Makes the error that names the first bad line."""
    with _open(path) as file:
        lines = file.readlines()
    good, end = 0, len(lines)
    # Lines are independent of each other, so the reader that refused the file also
    # finds the line, by halving.
    while end - good > 1:
        middle = (good + end) // 2
        if _complaint(lines[good:middle]):
            end = middle
        else:
            good = middle
    line = lines[good].strip()
    return ValueError(
        f"{path}, line {end}: {_complaint([line])}: {_short(repr(line), 60)}"
    )


def _short(text: str, most: int) -> str:
    """Cuts a text to so many characters."""
    return text if len(text) <= most else text[: most - 3] + "..."
