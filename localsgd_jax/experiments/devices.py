"""Devices of a command-line run."""

import os

import jax
import numpy as np
from jax.sharding import Mesh

import localsgd_jax as lsgd

MAX_CPU_DEVICES = 8


def make_local_mesh(workers: int, devices: int | None = None) -> Mesh:
    """Creates a mesh of devices for K workers.

    Uses the accelerators, or emulated CPU devices if there are none. CPU devices are
    created on demand, so this must precede all other uses of JAX; if JAX is initialised
    already, its devices are used. In a job of several processes each process uses the
    devices that the launcher gave to it, as evenly as K allows.

    Args:
      workers: K.
      devices: number of devices; by default the largest divisor of K up to the number
        of accelerators, or up to 8 CPU devices.

    Returns:
      A mesh with the single axis "worker".

    Raises:
      ValueError: if K is not a multiple of the devices, or there are fewer devices.
    """
    if jax.distributed.is_initialized():
        if devices is not None:
            raise ValueError(
                "--devices: the launcher sets the devices of each process, got "
                f"{devices}"
            )
        return lsgd.worker_mesh(workers)
    if devices is not None and workers % devices:
        raise ValueError(
            f"--workers must be a multiple of the {devices} devices, got {workers}"
        )
    num_cpu_devices = devices or largest_divisor(workers, MAX_CPU_DEVICES)
    os.environ.setdefault("NPROC", str(2 * num_cpu_devices))  # Before JAX 0.12.
    try:
        jax.config.update("jax_num_cpu_devices", num_cpu_devices)
    except RuntimeError:
        pass  # JAX is initialised already and keeps its devices.
    present = jax.devices()
    platform = present[0].platform
    if devices is None:
        limit = len(present)
        if platform == "cpu":
            limit = min(limit, MAX_CPU_DEVICES)
        devices = largest_divisor(workers, limit)
    if devices > len(present):
        raise ValueError(
            f"--devices must be at most {len(present)}, the number of {platform} "
            f"devices, got {devices}"
        )
    return Mesh(np.array(present[:devices]), ("worker",))


def largest_divisor(number: int, bound: int) -> int:
    """Returns the largest divisor of a number up to a bound.

    Args:
      number: at least 1.
      bound: at least 1.

    Returns:
      The divisor.

    Example:
      >>> largest_divisor(12, 8), largest_divisor(16, 8), largest_divisor(7, 4)
      (6, 8, 1)
    """
    return next(i for i in range(min(number, bound), 0, -1) if number % i == 0)
