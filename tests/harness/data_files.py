"""Paths of dataset files that a checkout does not contain."""

import os
from pathlib import Path

import pytest


def data_file(name: str) -> Path:
    """Returns the path of a dataset file in LOCALSGD_DATA, or skips the test.

    Args:
      name: registered name of a LIBSVM dataset, such as "w8a".
    """
    if directory := os.environ.get("LOCALSGD_DATA"):
        return Path(directory, name)
    datasets = pytest.importorskip("localsgd_jax.experiments.datasets")
    pytest.skip(
        f"{name} is missing; fetch it with: curl --create-dirs -o data/{name} "
        f"{datasets.BASE_URL}{name} && export LOCALSGD_DATA=$PWD/data"
    )
