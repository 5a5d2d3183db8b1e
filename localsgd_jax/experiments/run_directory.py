"""Output directory of a run: config.json, history.jsonl, params.npz, figure.png."""

import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from localsgd_jax.distributed.environment import package_version

PACKAGES = ("localsgd-jax", "jax", "jaxlib", "optax", "numpy", "scikit-learn")


def check_not_exists(path: Path) -> None:
    """Raises FileExistsError if the output directory exists."""
    if path.exists():
        raise FileExistsError(f"--out: {path} exists already")


def create(path: Path, config: Mapping) -> None:
    """Creates the directory with its parents and writes config.json.

    The package versions are added to the configuration, from which the run can be
    repeated. Raises an OSError if the directory exists or cannot be created.
    """
    path.mkdir(parents=True)
    text = json.dumps({**config, "versions": versions()}, indent=2)
    (path / "config.json").write_text(text + "\n", encoding="utf-8")


def append(path: Path, row: Mapping[str, float]) -> None:
    """Appends a row to history.jsonl; a value that is not finite becomes null.

    The file is closed after each row, so an interruption loses no earlier row.
    """
    finite = {
        name: number if math.isfinite(number) else None for name, number in row.items()
    }
    with open(path / "history.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def save_params(path: Path, x: np.ndarray) -> None:
    """Writes params.npz with the array "x", `(d,)`."""
    np.savez(path / "params.npz", x=x)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages in use, by name."""
    return {"python": platform.python_version()} | {
        package: package_version(package) for package in PACKAGES
    }
