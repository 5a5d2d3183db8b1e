"""Private JAX names used by this package, isolated in one module.

JAX has no public equivalent of its cluster detection, the client of its coordination
service and the state of its backends. `tests/distributed/test_jax_internals.py` checks
each of them on every supported JAX version.
"""

import re
from typing import Any

import jax
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state
from jax._src.xla_bridge import backends_are_initialized

__all__ = [
    "backends_are_initialized",
    "config_value",
    "coordination_client",
    "detect_cluster",
    "is_coordinator",
    "is_deadline_exceeded",
    "processes_missing_at_barrier",
]


def coordination_client() -> Any:
    """Returns the client of JAX's coordination service, or None without a job."""
    return global_state.client


def is_coordinator() -> bool:
    """Returns whether this process hosts the coordination service.

    `jax.process_index()` would initialise the backend, which waits for all processes.
    """
    return global_state.service is not None


def detect_cluster(
    coordinator_address: str | None, timeout: int
) -> tuple[str | None, int | None, int | None, list[int] | None]:
    """Returns the job description of a cluster environment known to JAX.

    JAX detects SLURM, Open MPI, Kubernetes and TPU pods.

    Args:
      coordinator_address: HOST:PORT that overrides the detected address, or None.
      timeout: seconds to wait for the address.

    Returns:
      Coordinator address, number of processes, process index and local device indices;
      None for each that is unknown.
    """
    address, num_processes, process_id, device_ids = (
        ClusterEnv.auto_detect_unset_distributed_params(
            coordinator_address, None, None, None, None, timeout
        )
    )
    return address, num_processes, process_id, list(device_ids) if device_ids else None


def config_value(name: str) -> object:
    """Returns the value of a `jax.config` flag.

    Args:
      name: name of the flag, such as "jax_enable_x64".

    Returns:
      Its value.

    Example:
      >>> config_value("jax_enable_x64")
      False
    """
    return getattr(jax.config, name)


def is_deadline_exceeded(error: Exception) -> bool:
    """Returns whether an error of the coordination service is a timeout."""
    return "DEADLINE_EXCEEDED" in str(error)


def processes_missing_at_barrier(error: Exception) -> list[int]:
    """Parses the missing processes from a barrier timeout; may be empty.

    The message of the service lists their indices, one a line, in front of an empty
    line: "… Some timed out task names:\\n1\\n\\n…".
    """
    _, _, names = str(error).partition("timed out task names:")
    numbers = re.findall(r"(\d+)$", names.partition("\n\n")[0], re.MULTILINE)
    return sorted(map(int, numbers))
