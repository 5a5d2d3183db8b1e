"""Rank and coordinator of this process, and the fingerprint of its environment."""

import importlib.metadata
import math
import os
from collections.abc import Mapping
from typing import NamedTuple

from localsgd_jax.core import validation
from localsgd_jax.distributed import _jax_internals

ADDRESS_VARIABLE = "LOCALSGD_COORDINATOR_ADDRESS"
NUM_PROCESSES_VARIABLE = "LOCALSGD_NUM_PROCESSES"
PROCESS_ID_VARIABLE = "LOCALSGD_PROCESS_ID"
JOB_ID_VARIABLE = "LOCALSGD_JOB_ID"
RESTART_COUNT_VARIABLE = "LOCALSGD_RESTART_COUNT"
LOOPBACK = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "::1": "[::1]"}
COMPARED_PACKAGES = ("localsgd-jax", "jax", "jaxlib", "optax", "numpy")
COMPARED_JAX_FLAGS = (
    "jax_enable_x64",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_default_matmul_precision",
)


class ProcessInfo(NamedTuple):
    """Rank of a process and address of its job.

    Attributes:
      coordinator_address: HOST:PORT of process 0.
      num_processes: number of processes in the job.
      process_id: index of this process, from 0.
      local_device_ids: local indices of the accelerators that it uses; None for all.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None


def resolve_process(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout: float,
) -> ProcessInfo | None:
    """Returns the process info from arguments, the environment or JAX's detection.

    Args:
      coordinator_address: argument of `initialize`.
      num_processes: argument of `initialize`.
      process_id: argument of `initialize`.
      timeout: seconds that JAX's cluster detection may wait for an address.

    Returns:
      The process info; None outside a job.

    Raises:
      TypeError: if a number is not an int.
      ValueError: if arguments or variables are incomplete or out of range.
    """
    arguments = (coordinator_address, num_processes, process_id)
    if coordinator_address is None or num_processes is None or process_id is None:
        if any(argument is not None for argument in arguments):
            raise ValueError(
                "initialize(coordinator_address, num_processes, process_id): pass all "
                f"three or none, got {arguments}"
            )
        return _from_environment() or _from_cluster(timeout)
    return _validate("initialize()", coordinator_address, num_processes, process_id)


def _from_environment() -> ProcessInfo | None:
    """Returns the process info from the LOCALSGD_* variables; None if none is set."""
    names = (ADDRESS_VARIABLE, NUM_PROCESSES_VARIABLE, PROCESS_ID_VARIABLE)
    values = [os.environ.get(name) for name in names]
    if values == [None] * 3:
        return None
    if None in values:
        raise ValueError(
            f"initialize(): {', '.join(names)} must all be set, but "
            f"{names[values.index(None)]} is not set"
        )
    numbers = [_int_from_env(name) for name in names[1:]]
    return _validate(", ".join(names), os.environ[ADDRESS_VARIABLE], *numbers)


def _int_from_env(name: str) -> int:
    """Returns an environment variable as a non-negative int."""
    text = os.environ[name]
    if not text.isdecimal():
        raise ValueError(
            f"initialize(): {name} must be a non-negative integer, got {text!r}"
        )
    return int(text)


def _from_cluster(timeout: float) -> ProcessInfo | None:
    """Returns the process info from JAX's cluster detection; None without one."""
    address, num_processes, process_id, device_ids = _jax_internals.detect_cluster(
        os.environ.get("JAX_COORDINATOR_ADDRESS"), math.ceil(timeout)
    )
    if address is None or num_processes is None or process_id is None:
        return None
    return ProcessInfo(address, num_processes, process_id, device_ids)


def _validate(
    call: str, coordinator_address: str, num_processes: int, process_id: int
) -> ProcessInfo:
    """Returns a process info after checking address and ranges."""
    parse_address(coordinator_address)
    num_processes = validation.check_int(call, "num_processes", num_processes, 1)
    process_id = validation.check_int(call, "process_id", process_id, 0)
    if process_id >= num_processes:
        raise ValueError(
            f"{call}: process_id must be less than num_processes={num_processes}, got "
            f"{process_id}"
        )
    return ProcessInfo(coordinator_address, num_processes, process_id)


def parse_address(address: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT; IPv6 addresses are in brackets.

    Args:
      address: HOST:PORT.

    Returns:
      Host without brackets and port.

    Raises:
      ValueError: if the address has another form.

    Example:
      >>> parse_address("[::1]:8080")
      ('::1', 8080)
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(
            f"initialize(coordinator_address): must be HOST:PORT, got {address!r}"
        )
    return host.strip("[]"), int(port)


def default_bind_address(process: ProcessInfo) -> str:
    """Returns the default listening address of process 0.

    It is the loopback interface if the coordinator's address is, so that the port is
    closed to other machines, and all interfaces otherwise.

    Args:
      process: process info.

    Returns:
      HOST:PORT.

    Example:
      >>> default_bind_address(ProcessInfo("localhost:8080", 2, 0))
      '127.0.0.1:8080'
    """
    host, port = parse_address(process.coordinator_address)
    return f"{LOOPBACK.get(host, '[::]')}:{port}"


def job_fingerprint(process: ProcessInfo, config: Mapping) -> dict:
    """Returns the values to compare between the processes of a job.

    Args:
      process: process info.
      config: JSON values that the caller compares.

    Returns:
      Job id, number of processes, package versions, JAX flags and `config`.
    """
    return {
        "job_id": job_id(),
        "num_processes": process.num_processes,
        "version": {name: package_version(name) for name in COMPARED_PACKAGES},
        "jax_config": {
            name: str(_jax_internals.config_value(name)) for name in COMPARED_JAX_FLAGS
        },
        "config": config,
    }


def job_id() -> str:
    """Returns the id of the job, by the launcher or by SLURM; empty without either."""
    slurm = [os.environ.get(f"SLURM_{x}", "") for x in ("JOB_ID", "STEP_ID")]
    return os.environ.get(JOB_ID_VARIABLE) or ".".join(slurm).strip(".")


def package_version(package: str) -> str:
    """Returns the installed version of a distribution, or "not installed".

    Args:
      package: name of the distribution.

    Returns:
      The version.

    Example:
      >>> package_version("no-such-package")
      'not installed'
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
