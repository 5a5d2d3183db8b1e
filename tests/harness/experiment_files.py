"""Input and output files of the experiments: a small dataset, tables and figures."""

import csv
import os

import pytest
from sklearn.datasets import dump_svmlight_file

from localsgd_jax.experiments import datasets

DIGITS = datasets.digits()


def write_digits(path, count=400):
    """Writes the first digits as a LIBSVM file; returns its path."""
    dump_svmlight_file(DIGITS.features[:count], DIGITS.labels[:count], str(path))
    return str(path)


def read_csv(path):
    """Returns the rows of a CSV file as dicts of text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_figures(directory, name):
    """Asserts that NAME.png and NAME.svg are images."""
    assert (directory / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (directory / f"{name}.svg").read_text(encoding="utf-8")


def require_dataset(name):
    """Skips a test without the file of a registered dataset in LOCALSGD_DATA."""
    if not os.path.exists(os.path.join(os.environ.get("LOCALSGD_DATA", ""), name)):
        url = datasets.BASE_URL + name
        pytest.skip(f"set LOCALSGD_DATA to a directory with {name}: curl -O {url}")
