"""Devices to compile for: those that are here, or others that only a compiler knows."""

import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

CPUS = 8

# As the driver of an H100 with 80 GB of HBM3 describes it to the compiler.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
GPUS = {"h100": _H100}


def mesh(target: str | None = None, axes: Mapping[str, int] | None = None) -> Mesh:
    """Makes a mesh of the devices to compile for.

    Args:
      target: `tpu:KIND:TOPOLOGY` such as tpu:v5e:2x4, `gpu:KIND:COUNT` such as
        gpu:h100:8, or `gpu:KIND:HOSTSxCOUNT`; None for the devices that are present,
        8 emulated ones on a CPU.
      axes: names and sizes of the axes; None for one axis "worker" of all devices.

    Returns:
      The mesh.

    Raises:
      ValueError: if the target is unknown, the compiler is not installed, or the sizes
        do not give the number of devices.
    """
    devices = _present(axes) if target is None else described(target)
    sizes = dict(axes or {"worker": len(devices)})
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"--mesh {','.join(f'{k}={v}' for k, v in sizes.items())} has "
            f"{math.prod(sizes.values())} places for {len(devices)} devices"
        )
    grid = np.array(devices).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * grid.ndim)


def described(target: str) -> Sequence:
    """Returns devices that need not be present, to compile for and not to run on.

    Args:
      target: as for `mesh`.

    Returns:
      The devices.

    Raises:
      ValueError: if the target is unknown or the compiler is not installed.
    """
    family, _, rest = target.partition(":")
    kind, _, shape = rest.partition(":")
    if family not in ("tpu", "gpu") or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ValueError(
            "--target must look like tpu:v5e:2x4 or gpu:h100:8, got " + repr(target)
        )
    # Otherwise JAX would look for the accelerators themselves.
    jax.config.update("jax_platforms", "cpu")
    return _tpus(kind, shape) if family == "tpu" else _gpus(kind, shape)


def installed(family: str) -> bool:
    """Returns whether the compiler for "tpu" or "gpu" is installed."""
    modules = {
        "tpu": ["libtpu"],
        "gpu": ["jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"],
    }
    return any(map(_found, modules[family]))


def _found(module: str) -> bool:
    """Returns whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _present(axes: Mapping[str, int] | None) -> Sequence:
    """Returns the devices that are here, as many as the axes need."""
    count = math.prod(axes.values()) if axes else None
    try:
        jax.config.update("jax_num_cpu_devices", count or CPUS)
    except RuntimeError:
        pass  # JAX has started and keeps its devices.
    return jax.devices()[:count]


def _tpus(kind: str, shape: str) -> Sequence:
    """Describes a slice of TPUs."""
    _check_installed("tpu")
    # Without it the compiler asks the cloud which machine this is, and waits.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # No TPU is touched, so several audits may run at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(f"{kind}:{shape}", "tpu").devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"--target tpu:{kind}:{shape}: {error}") from None


def _gpus(kind: str, shape: str) -> Sequence:
    """Describes hosts of GPUs."""
    if kind not in GPUS:
        raise ValueError(
            f"--target gpu:{kind}: the GPUs known are {', '.join(GPUS)}, got {kind!r}"
        )
    _check_installed("gpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from jax.experimental import topologies

    counts = shape.split("x")
    if len(counts) > 2:
        raise ValueError(
            f"--target gpu:{kind}:{shape}: it must be a count of GPUs, or hosts x count"
        )
    grid = "x".join(["1"] * (3 - len(counts)) + counts)
    return topologies.get_topology_desc(
        grid, "cuda", target_config=GPUS[kind], topology=grid
    ).devices


def _check_installed(family: str) -> None:
    """Names the extra that is missing."""
    if not installed(family):
        raise ValueError(
            f"--target {family}: its compiler is an extra: pip install "
            f'"localsgd-jax[audit-{family}]"'
        )
