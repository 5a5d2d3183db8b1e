"""Compile targets: local devices, or TPU and GPU topologies for AOT compilation."""

import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

DEFAULT_CPU_DEVICES = 8

# Target description that the driver of an H100 with 80 GB of HBM3 gives to XLA.
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
GPU_TARGETS = {"h100": _H100}

_TARGET = re.compile(r"(tpu|gpu):(\w+):(\d+(?:x\d+)*)(?::slices=([1-9]\d*))?")
# Kinds whose slices are two-dimensional.
_PLANAR_TPUS = ("v2", "v3", "v5e", "v6e")


def target_mesh(
    target: str | None = None, axes: Mapping[str, int] | None = None
) -> Mesh:
    """Returns a mesh of the devices of a compile target.

    Args:
      target: `tpu:KIND:TOPOLOGY` such as tpu:v5e:2x4, with `:slices=N` for several TPU
        slices, `gpu:KIND:COUNT` such as gpu:h100:8, or `gpu:KIND:HOSTSxCOUNT`; None
        for the local devices, which are 8 emulated devices on a CPU.
      axes: names and sizes of the axes; None for one axis "worker" of all devices.

    Returns:
      The mesh. Consecutive devices share a slice or host, so that the outermost axes
      cross slices or hosts.

    Raises:
      ValueError: if the target is unknown, its compiler is not installed, or the
        product of the axis sizes is not the number of devices.
    """
    devices = _local_devices(axes) if target is None else topology_devices(target)
    sizes = dict(axes or {"worker": len(devices)})
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"--mesh {','.join(f'{k}={v}' for k, v in sizes.items())} has "
            f"{math.prod(sizes.values())} positions for {len(devices)} devices"
        )
    grid = np.array(devices).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * grid.ndim)


def topology_devices(target: str) -> Sequence:
    """Returns the compile-only devices of TPU slices or GPU hosts.

    Args:
      target: as for `target_mesh`.

    Returns:
      The devices, slice by slice or host by host.

    Raises:
      ValueError: if the target is unknown or its compiler is not installed.
    """
    match = _TARGET.fullmatch(target)
    if match is None:
        raise ValueError(
            "--target must look like tpu:v5e:2x4, tpu:v5e:4x4:slices=2, gpu:h100:8 or "
            f"gpu:h100:2x8, got {target!r}"
        )
    family, kind, shape, slices = match.groups()
    if family == "gpu" and slices:
        raise ValueError(
            f"--target {target}: GPUs have no slices; for {slices} hosts write "
            f"gpu:{kind}:{slices}x{shape.split('x')[-1]}"
        )
    # Keeps JAX from initialising local accelerators.
    jax.config.update("jax_platforms", "cpu")
    if family == "gpu":
        return _gpu_topology(kind, shape)
    return _tpu_topology(kind, shape, int(slices or 1))


def is_compiler_installed(family: str) -> bool:
    """Returns whether the compiler for "tpu" or "gpu" is installed."""
    modules = {
        "tpu": ["libtpu"],
        "gpu": ["jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"],
    }
    return any(map(_is_importable, modules[family]))


def install_command(family: str) -> str:
    """Returns the command that installs the compiler for "tpu" or "gpu"."""
    return f'pip install "localsgd-jax[audit-{family}]"'


def _is_importable(module: str) -> bool:
    """Returns whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _local_devices(axes: Mapping[str, int] | None) -> Sequence:
    """Returns as many local devices as the axes need; all without axes."""
    count = math.prod(axes.values()) if axes else None
    try:
        jax.config.update("jax_num_cpu_devices", count or DEFAULT_CPU_DEVICES)
    except RuntimeError:
        pass  # The backends are initialised already; their devices stay.
    return jax.devices()[:count]


def _tpu_topology(kind: str, shape: str, slices: int) -> Sequence:
    """Returns the devices of one or more TPU slices, slice by slice."""
    _check_dimensions(kind, shape)
    _check_installed("tpu")
    # libtpu would otherwise query the cloud metadata server and wait for a timeout.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # No TPU is opened, so several processes may load libtpu at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(
            f"{kind}:{shape}", "tpu", num_slices=slices
        ).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"--target tpu:{kind}:{shape}: {error}") from None
    # The devices of a single slice have no index.
    return sorted(devices, key=lambda each: (getattr(each, "slice_index", 0), each.id))


def _check_dimensions(kind: str, shape: str) -> None:
    """Raises if a third dimension is given to a kind of two-dimensional slices.

    The compiler would accept it, although there is no such slice.
    """
    sizes = shape.split("x")
    if kind in _PLANAR_TPUS and any(size != "1" for size in sizes[2:]):
        raise ValueError(
            f"--target tpu:{kind}:{shape}: slices of {kind} have two dimensions; for "
            f"{sizes[-1]} slices write tpu:{kind}:{'x'.join(sizes[:-1])}"
            f":slices={sizes[-1]}"
        )


def _gpu_topology(kind: str, shape: str) -> Sequence:
    """Returns the devices of one or more GPU hosts."""
    if kind not in GPU_TARGETS:
        raise ValueError(
            f"--target gpu:{kind}: the kind must be one of {', '.join(GPU_TARGETS)}, "
            f"got {kind!r}"
        )
    _check_installed("gpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from jax.experimental import topologies

    counts = shape.split("x")
    if len(counts) > 2:
        raise ValueError(
            f"--target gpu:{kind}:{shape}: the topology must be COUNT or HOSTSxCOUNT"
        )
    grid = "x".join(["1"] * (3 - len(counts)) + counts)
    return topologies.get_topology_desc(
        grid, "cuda", target_config=GPU_TARGETS[kind], topology=grid
    ).devices


def _check_installed(family: str) -> None:
    """Raises with the install command if the compiler is not installed."""
    if not is_compiler_installed(family):
        raise ValueError(
            f"--target {family}: the compiler is not installed: "
            f"{install_command(family)}"
        )
