import pytest
from harness.experiment_files import DIGITS, write_digits

from localsgd_jax.experiments.paper import step_size_grid


@pytest.fixture(scope="session")
def digits_file(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def examples():
    return step_size_grid.to_device(DIGITS)
