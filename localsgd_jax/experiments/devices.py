"""Devices for the workers: the accelerators present, or as many CPU devices."""

import jax
import numpy as np
from jax.sharding import Mesh

from localsgd_jax import meshes

MOST_CPUS = 8


def worker_mesh(workers: int, devices: int | None = None) -> Mesh:
    """Makes a mesh of devices over which the workers can be spread.

    CPU devices are made on demand, so this comes before anything else of JAX; where
    JAX runs already, those that it has are used. Several processes use what each was
    given, as evenly as K allows.

    Args:
      workers: K.
      devices: how many; None for as many as there are accelerators or, on a CPU, 8,
        but the largest divisor of K up to there.

    Returns:
      A mesh with the one axis "worker".

    Raises:
      ValueError: if K is not a multiple of the devices, or there are fewer devices.
    """
    if jax.distributed.is_initialized():
        if devices is not None:
            raise ValueError(
                f"--devices: processes have theirs from the launcher, got {devices}"
            )
        return meshes.worker_mesh(workers)
    if devices is not None and workers % devices:
        raise ValueError(
            f"--workers must be a multiple of the {devices} devices, got {workers}"
        )
    try:
        jax.config.update("jax_num_cpu_devices", devices or divisor(workers, MOST_CPUS))
    except RuntimeError:
        pass  # JAX has started and keeps its devices.
    present = jax.devices()
    if devices is None:
        cpu = present[0].platform == "cpu"
        most = min(len(present), MOST_CPUS) if cpu else len(present)
        devices = divisor(workers, most)
    if devices > len(present):
        raise ValueError(
            f"--devices must be at most {len(present)}, the {present[0].platform} "
            f"devices present, got {devices}"
        )
    return Mesh(np.array(present[:devices]), ("worker",))


def divisor(number: int, most: int) -> int:
    """Returns the largest divisor up to a bound.

    Args:
      number: at least 1.
      most: the bound, at least 1.

    Returns:
      The divisor.

    Example:
      >>> divisor(12, 8), divisor(16, 8), divisor(7, 4)
      (6, 8, 1)
    """
    return next(i for i in range(min(number, most), 0, -1) if number % i == 0)
