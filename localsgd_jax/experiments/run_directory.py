"""Output directory of a run: config.json, history.jsonl, params.npz, figure.png."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from localsgd_jax.reporting import to_run_directory


def check_not_exists(path: Path) -> None:
    """Raises FileExistsError if the output directory exists."""
    if path.exists():
        raise FileExistsError(f"--out: {path} exists already")


def create(path: Path, config: Mapping) -> Callable:
    """Creates the directory with its parents and writes config.json.

    The package versions are added to the configuration, from which the run can be
    repeated.

    Returns:
      A function that appends a row to history.jsonl.

    Raises:
      OSError: if the directory exists or cannot be created.
    """
    path.mkdir(parents=True)
    return to_run_directory(path, config)


def save_params(path: Path, x: np.ndarray) -> None:
    """Writes params.npz with the array "x", `(d,)`."""
    np.savez(path / "params.npz", x=x)
