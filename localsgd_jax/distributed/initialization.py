"""Initialisation of a multi-process job: rendezvous, then `jax.distributed`."""

import math
import os
from collections.abc import Mapping

import jax

from localsgd_jax.core import validation
from localsgd_jax.distributed import coordination, rendezvous
from localsgd_jax.distributed._jax_internals import backends_are_initialized
from localsgd_jax.distributed.coordination import CoordinationError
from localsgd_jax.distributed.environment import (
    ProcessInfo,
    default_bind_address,
    job_fingerprint,
    resolve_process,
)
from localsgd_jax.distributed.mismatches import to_json
from localsgd_jax.distributed.shutdown import install_exit_handlers

MAX_TIMEOUT_SECONDS = 1e6
# After the rendezvous all processes are ready to connect.
MIN_CONNECT_TIMEOUT_SECONDS = 10


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    coordinator_bind_address: str | None = None,
    config: Mapping[str, object] | None = None,
    timeout: float = 300,
    heartbeat_timeout_seconds: int = 100,
    recoverable: bool = False,
) -> int:
    """Connects the processes of a job; call it before any other use of JAX.

    Address, number and index default to those of `localsgd launch`, that is, of the
    environment variables LOCALSGD_COORDINATOR_ADDRESS, LOCALSGD_NUM_PROCESSES and
    LOCALSGD_PROCESS_ID, or of an environment that JAX detects: SLURM, Open MPI,
    Kubernetes, TPU pods. Outside a job the call has no effect, so every program may
    begin with it.

    Before JAX connects, all processes register at the coordinator's port (TCP
    rendezvous), where their job ids, package versions, JAX flags that change programs,
    and `config` are compared. If a process is missing, duplicate, of another job or
    different, all of them raise. Afterwards an uncaught exception ends its process at
    once instead of blocking in JAX's shutdown barrier, and JAX's preemption service is
    disabled, so SIGTERM has its usual effect.

    From the rendezvous on, a process that exits or hangs is noticed after
    `heartbeat_timeout_seconds`. A recoverable job initialises its devices here, because
    JAX exchanges their topology without heartbeats.

    Args:
      coordinator_address: HOST:PORT of process 0.
      num_processes: number of processes.
      process_id: index of this process, from 0.
      coordinator_bind_address: HOST:PORT on which process 0 listens. None selects the
        loopback interface for a coordinator on this machine, and all interfaces
        otherwise.
      config: JSON-serialisable values that must be equal in all processes, such as the
        options of the program.
      timeout: seconds to wait for other processes: in the rendezvous, in later checks
        and at exit.
      heartbeat_timeout_seconds: seconds without a heartbeat after which a process
        counts as failed.
      recoverable: whether the job survives failures of processes other than 0. Process
        0 then waits at its exit until the others have exited.

    Returns:
      Number of processes.

    Raises:
      CoordinationError: if the rendezvous fails; the message names the missing
        processes or the mismatch.
      TypeError: if a number is not an int, or `config` is not JSON-serialisable.
      ValueError: if only some of the first three arguments are given, or a number is
        out of range.
      RuntimeError: if a JAX backend is already initialised.

    Example:
      >>> import localsgd_jax as lsgd
      >>> lsgd.initialize()
      1
    """
    validation.check_int(
        "initialize(heartbeat_timeout_seconds)",
        "heartbeat_timeout_seconds",
        heartbeat_timeout_seconds,
        1,
    )
    _check_timeout(timeout)
    addresses = {
        "coordinator_address": coordinator_address,
        "coordinator_bind_address": coordinator_bind_address,
    }
    _check_types(addresses, config, recoverable)
    json_config = to_json("initialize(config)", config or {})
    process = resolve_process(coordinator_address, num_processes, process_id, timeout)
    if process is None or process.num_processes == 1:
        return 1
    if jax.distributed.is_initialized():
        return jax.process_count()
    if backends_are_initialized():
        raise RuntimeError(
            "initialize(): must be called before any JAX device is used, that is, "
            "before arrays, meshes, and rules such as diloco()"
        )
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_enable_recoverability", recoverable)
    job_state = coordination.job_state
    job_state.timeout, job_state.recoverable = timeout, recoverable
    job_state.has_peers = True
    bind_address = (
        coordinator_bind_address
        or os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
        or default_bind_address(process)
    )
    fingerprint = job_fingerprint(process, json_config)
    heartbeat_timeout = heartbeat_timeout_seconds
    if process.process_id == 0:
        rendezvous.serve(
            bind_address, fingerprint, process.num_processes, timeout, heartbeat_timeout
        )
    else:
        address, process_id = process.coordinator_address, process.process_id
        rendezvous.join(address, fingerprint, process_id, timeout, heartbeat_timeout)
    _connect(process, bind_address, timeout, heartbeat_timeout)
    install_exit_handlers(process, recoverable, timeout)
    if recoverable:
        jax.local_devices()
    return process.num_processes


def _connect(
    process: ProcessInfo, bind_address: str, timeout: float, heartbeat_timeout: int
) -> None:
    """Initialises `jax.distributed` for a resolved process."""
    connect_timeout = min(timeout, max(heartbeat_timeout, MIN_CONNECT_TIMEOUT_SECONDS))
    try:
        jax.distributed.initialize(
            process.coordinator_address,
            process.num_processes,
            process.process_id,
            local_device_ids=process.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=math.ceil(connect_timeout),
            heartbeat_timeout_seconds=heartbeat_timeout,
            coordinator_bind_address=bind_address,
        )
    except jax.errors.JaxRuntimeError as error:
        raise CoordinationError(
            f"initialize(): JAX cannot serve on {bind_address} or connect to "
            f"{process.coordinator_address}: {str(error).splitlines()[0]}"
        ) from error


def _check_types(
    addresses: Mapping[str, str | None],
    config: Mapping[str, object] | None,
    recoverable: bool,
) -> None:
    """Raises a TypeError unless addresses, configuration and flag have their types."""
    call = "initialize"
    validation.check_type(f"{call}(recoverable)", "recoverable", recoverable, bool)
    for name, address in addresses.items():
        if address is not None:
            validation.check_type(f"{call}({name})", name, address, str)
    if config is not None:
        validation.check_type(f"{call}(config)", "config", config, Mapping)


def _check_timeout(timeout: float) -> None:
    """Raises if a timeout is not a positive, finite number of seconds."""
    largest = MAX_TIMEOUT_SECONDS
    validation.check_number(
        "initialize(timeout)", "timeout", timeout, above=0, at_most=largest
    )
