"""Reader of LIBSVM files that reports the line number of a parse error."""

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
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


def read_libsvm(path: Path) -> tuple[csr_matrix, np.ndarray]:
    """Reads a file in LIBSVM format, plain or compressed (.gz, .bz2, .xz).

    Args:
      path: the file. Indices start at 1, or at 0 if index 0 occurs.

    Returns:
      The features, float64 `(n, d)`, and the labels as in the file, float64 `(n,)`.

    Raises:
      ValueError: with the line number, if a line is not in LIBSVM format or has a value
        that is not finite in float32; if there are no examples or no features; if
        compressed data is damaged.
      OSError: if the file cannot be opened.
    """
    try:
        with _open(path) as file:
            features, labels = load_svmlight_file(file)
    except (ValueError, OverflowError):
        raise _bad_line_error(path) from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}: damaged or truncated: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path}: damaged or not compressed: {error}") from None
    if not _is_finite(features, labels):
        raise _bad_line_error(path)
    if not len(labels):
        raise ValueError(f"{path}: the file has no examples")
    if not np.any(features.data.astype(np.float32)):
        raise ValueError(f"{path}: all features are 0 in float32")
    return features, labels


def _open(path: Path) -> BinaryIO:
    """Opens a file for reading decompressed bytes."""
    return _OPEN.get(path.suffix, open)(path, "rb")


def _is_finite(features: csr_matrix, labels: np.ndarray) -> bool:
    """Returns whether all values are finite in float32."""
    return bool(
        np.all(np.abs(features.data) <= _MAX_FLOAT32) and np.all(np.isfinite(labels))
    )


def _parse_error(lines: list[bytes]) -> str | None:
    """Returns the parse error of some lines, or None."""
    try:
        finite = _is_finite(*load_svmlight_file(io.BytesIO(b"".join(lines))))
    except (ValueError, OverflowError) as error:
        return f"not in LIBSVM format, {_truncate(str(error), 80)}"
    return None if finite else "a value is not finite in float32"


def _bad_line_error(path: Path) -> ValueError:
    """Returns the error for the first bad line, found by bisection."""
    with _open(path) as file:
        lines = file.readlines()
    good, end = 0, len(lines)
    # Lines are independent, so scikit-learn's reader also accepts or rejects a part.
    while end - good > 1:
        middle = (good + end) // 2
        if _parse_error(lines[good:middle]):
            end = middle
        else:
            good = middle
    line = lines[good].strip()
    return ValueError(
        f"{path}, line {end}: {_parse_error([line])}: {_truncate(repr(line), 60)}"
    )


def _truncate(text: str, width: int) -> str:
    """Truncates a text to `width` characters."""
    return text if len(text) <= width else text[: width - 3] + "..."
