"""Environment without variables of a job or cluster."""

import os

import pytest

PREFIXES = (
    "LOCALSGD_COORDINATOR_ADDRESS",
    "LOCALSGD_NUM_PROCESSES",
    "LOCALSGD_PROCESS_ID",
    "LOCALSGD_JOB_ID",
    "SLURM_",
    "OMPI_",
)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Removes variables by which a process could find a job."""
    for name in os.environ:
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)
