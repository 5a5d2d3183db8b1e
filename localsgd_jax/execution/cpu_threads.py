"""Warning about too few threads for several CPU devices."""

import os
import warnings

import jax
from jax.sharding import Mesh

_THREADS_PER_DEVICE = 2


def warn_about_threads(mesh: Mesh) -> None:
    """Warns if a loop on several CPU devices may run out of threads.

    Before JAX 0.12, collectives of queued programs wait for threads that other programs
    hold, and XLA aborts the process after 40 seconds. `train` queues few programs.

    Args:
      mesh: mesh of the workers.
    """
    if jax.__version_info__ >= (0, 12) or mesh.devices.flat[0].platform != "cpu":
        return
    devices = sum(x.process_index == jax.process_index() for x in mesh.devices.flat)
    required, threads = _THREADS_PER_DEVICE * devices, _num_threads()
    if devices > 1 and threads < required:
        warnings.warn(
            f"on_mesh(mesh): before JAX 0.12, {devices} CPU devices in a process must "
            f"have {required} threads, got {threads}; a loop over gated or fused may "
            "abort. Add this line before JAX creates the devices: "
            f'os.environ["NPROC"] = "{required}"',
            RuntimeWarning,
            stacklevel=3,
        )


def _num_threads() -> int:
    """Returns the number of threads of XLA's CPU client."""
    given = os.environ.get("PJRT_NPROC") or os.environ.get("NPROC", "")
    if given.isdecimal():
        return int(given)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
