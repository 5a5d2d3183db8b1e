"""The directory of a run: config.json, history.jsonl, params.npz, figure.png."""

import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from localsgd_jax.distributed import version

PACKAGES = ("localsgd-jax", "jax", "jaxlib", "optax", "numpy", "scikit-learn")


def refuse_existing(path: Path) -> None:
    """Refuses to write into what is there already.

    Args:
      path: of the run directory to be.

    Raises:
      FileExistsError: if there is a file or directory.
    """
    if path.exists():
        raise FileExistsError(f"--out: {path} exists already")


def create(path: Path, config: Mapping) -> None:
    """Creates the directory and writes config.json.

    Args:
      path: of the directory; parents are made too.
      config: what repeats the run, written together with the versions in use.

    Raises:
      OSError: if it exists or cannot be made.
    """
    path.mkdir(parents=True)
    text = json.dumps({**config, "versions": versions()}, indent=2)
    (path / "config.json").write_text(text + "\n", encoding="utf-8")


def append(path: Path, row: Mapping[str, float]) -> None:
    """Adds a row to history.jsonl, closed at once so that nothing is lost later.

    Args:
      path: of the directory.
      row: numbers by name; what is not finite becomes null.
    """
    finite = {
        name: number if math.isfinite(number) else None for name, number in row.items()
    }
    with open(path / "history.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def save_params(path: Path, x: np.ndarray) -> None:
    """Writes params.npz with the one array "x".

    Args:
      path: of the directory.
      x: `(d,)`.
    """
    np.savez(path / "params.npz", x=x)


def versions() -> dict[str, str]:
    """Returns the versions that a run depends on.

    Returns:
      Versions by package, and that of Python.
    """
    return {"python": platform.python_version()} | {
        package: version(package) for package in PACKAGES
    }
