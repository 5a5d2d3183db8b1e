"""Rank and coordinator from arguments, variables and clusters that JAX detects."""

import inspect
import re

import pytest
from harness.paths import ROOT
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.distributed import environment
from localsgd_jax.distributed.environment import ProcessInfo

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[003-005,9]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_VERSION": "4.1.6",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.2:45911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


def test_loopback_coordinator_is_closed_to_other_machines():
    process = ProcessInfo("127.0.0.1:1234", 2, 0)
    assert environment.default_bind_address(process) == "127.0.0.1:1234"

    def bind_address(coordinator):
        return environment.default_bind_address(
            process._replace(coordinator_address=coordinator)
        )

    assert bind_address("localhost:99").startswith("127")
    assert bind_address("[::1]:99") == "[::1]:99"
    assert bind_address("10.0.0.7:99") == "[::]:99"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("localhost:1", 2, None), "pass all three or none, got"),
        (("localhost", 2, 0), "must be HOST:PORT, got 'localhost'"),
        (("localhost:70000", 2, 0), "must be HOST:PORT"),
        in_full(("localhost:²", 2, 0), "must be HOST:PORT"),
        (("localhost:1", 2, 2), "process_id must be less than num_processes=2, got 2"),
        (("localhost:1", 0, 0), "num_processes must be at least 1, got 0"),
    ],
)
def test_invalid_process_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        lsgd.initialize(*arguments)


@pytest.mark.parametrize("name", ["COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"])
def test_incomplete_variables_raise(monkeypatch, name):
    monkeypatch.setenv(f"LOCALSGD_{name}", "1")
    message = r"LOCALSGD_COORDINATOR_ADDRESS, .* must all be set, but .* is not set"
    with pytest.raises(ValueError, match=message):
        lsgd.initialize()


def test_launcher_variables(monkeypatch):
    monkeypatch.setenv("LOCALSGD_COORDINATOR_ADDRESS", "10.0.0.7:1234")
    with pytest.raises(ValueError, match="but LOCALSGD_NUM_PROCESSES is not set"):
        lsgd.initialize()
    monkeypatch.setenv("LOCALSGD_NUM_PROCESSES", "4")
    for number in ("x", "²"):
        monkeypatch.setenv("LOCALSGD_PROCESS_ID", number)
        message = "LOCALSGD_PROCESS_ID must be a non-negative integer"
        with pytest.raises(ValueError, match=message):
            lsgd.initialize()
    monkeypatch.setenv("LOCALSGD_PROCESS_ID", "3")
    process = environment.resolve_process(None, None, None, 1)
    assert process == ProcessInfo("10.0.0.7:1234", 4, 3)


@pytest.mark.parametrize(
    "variables, host, num_processes, process_id, device_ids",
    [
        (SLURM, "node003", 8, 5, [1]),
        (OPEN_MPI, "10.0.0.2", 4, 2, [0]),
    ],
    ids=["slurm", "open mpi"],
)
def test_clusters_detected_by_jax(
    monkeypatch, variables, host, num_processes, process_id, device_ids
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    process = environment.resolve_process(None, None, None, 1)
    assert process.coordinator_address.rpartition(":")[0] == host
    assert process[1:] == (num_processes, process_id, device_ids)
    if variables is SLURM:
        assert environment.job_fingerprint(process, {})["job_id"] == "4242.0"


@pytest.fixture
def guide():
    return (ROOT / "docs" / "guides" / "multi_process.md").read_text()


def test_manifest_of_the_guide_sets_the_variables(monkeypatch, guide):
    found = re.findall(r"name: (LOCALSGD_\w+)(?:, value: \"(.*?)\")?", guide)
    assert len(found) == 3
    for name, value in found:
        monkeypatch.setenv(name, value or "3")
    process = environment.resolve_process(None, None, None, 1)
    assert process == ProcessInfo("train-0.localsgd:29500", 4, 3)


def test_guide_names_slurm_variables_and_arguments(guide):
    for name in SLURM.keys() - {"SLURM_STEP_ID"}:
        assert name in guide
    for name in (
        "heartbeat_timeout_seconds",
        "timeout",
        "coordinator_bind_address",
        "config",
    ):
        assert f"`{name}" in guide or f"{name}=" in guide
        assert name in inspect.signature(lsgd.initialize).parameters
