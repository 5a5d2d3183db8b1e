"""Environment variables of the processes of a job."""

import os


def job_environment(
    address: str, job_id: str, num_processes: int, devices: int, restart_count: int
) -> dict[str, str]:
    """Returns the variables common to all processes.

    Args:
      address: HOST:PORT of process 0.
      job_id: identifier of this start of the job.
      num_processes: number of processes.
      devices: CPU devices or accelerators of each process.
      restart_count: number of earlier starts.

    Returns:
      Values by name.
    """
    return {
        "LOCALSGD_COORDINATOR_ADDRESS": address,
        "LOCALSGD_NUM_PROCESSES": str(num_processes),
        "LOCALSGD_JOB_ID": job_id,
        "LOCALSGD_RESTART_COUNT": str(restart_count),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONUNBUFFERED": "1",
        "NPROC": os.environ.get("NPROC", _default_num_threads(devices)),
    }


def process_environment(process_id: int, slot: int, devices: int) -> dict[str, str]:
    """Returns the variables of one process.

    Args:
      process_id: index of the process.
      slot: index of its group of devices.
      devices: number of devices in a group.

    Returns:
      Values by name.

    Example:
      >>> process_environment(1, slot=2, devices=2)["JAX_LOCAL_DEVICE_IDS"]
      '4,5'
    """
    first = slot * devices
    return {
        "LOCALSGD_PROCESS_ID": str(process_id),
        "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(first, first + devices))),
    }


def _default_num_threads(devices: int) -> str:
    """Returns the default of NPROC, the size of XLA's CPU thread pool.

    With fewer threads JAX 0.10 and 0.11 starve on CPUs.
    """
    return str(max(os.cpu_count() or 1, 2 * devices, 8))
