"""Meshes of the devices of several TPU slices or GPU hosts, without the hardware."""

import math
import os
from typing import NamedTuple

import numpy as np
from jax.sharding import AxisType, Mesh

from localsgd_jax.analysis import compile_targets

# Without a TPU: no metadata server, no exclusive libtpu, no warnings about the host.
_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


class Topology(NamedTuple):
    """A compile target and the axes of its mesh.

    Attributes:
      target: `tpu:KIND:TOPOLOGY`, the topology of one slice, or `gpu:KIND:HOSTSxCOUNT`.
      slices: number of TPU slices.
      axes: names and sizes of the mesh axes, outermost first.
      worker_axes: names of the axes between workers; the others are inside a worker.
      lanes: workers per position of the worker axes.
    """

    target: str
    slices: int
    axes: dict[str, int]
    worker_axes: tuple[str, ...] = ("worker",)
    lanes: int = 1

    @property
    def num_workers(self) -> int:
        """Number of workers, K."""
        return self.lanes * math.prod(self.axes[name] for name in self.worker_axes)

    @property
    def inner_axes(self) -> tuple[str, ...]:
        """Names of the axes inside a worker."""
        return tuple(name for name in self.axes if name not in self.worker_axes)

    @property
    def devices_per_worker(self) -> int:
        """Number of devices of a position of the worker axes."""
        return math.prod(self.axes[name] for name in self.inner_axes)


def missing_compiler(family: str) -> str | None:
    """Returns why nothing can be compiled for "tpu" or "gpu"; None if it can."""
    if compile_targets.is_compiler_installed(family):
        return None
    command = compile_targets.install_command(family)
    return f"the compiler for {family.upper()}s is not installed: {command}"


def make_mesh(topology: Topology) -> Mesh:
    """Returns the mesh of a topology; consecutive devices share a slice."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    devices = np.array(_devices(topology)).reshape(tuple(topology.axes.values()))
    axis_types = (AxisType.Auto,) * devices.ndim
    return Mesh(devices, tuple(topology.axes), axis_types=axis_types)


def _devices(topology: Topology) -> list:
    """Returns the compile-only devices, slice by slice."""
    family, _, name = topology.target.partition(":")
    if family == "gpu" or topology.slices == 1:
        return list(compile_targets.topology_devices(topology.target))
    from jax.experimental import topologies

    description = topologies.get_topology_desc(name, "tpu", num_slices=topology.slices)
    return sorted(
        description.devices, key=lambda device: (device.slice_index, device.id)
    )
