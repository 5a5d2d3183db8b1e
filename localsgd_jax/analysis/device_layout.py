"""Positions of a mesh: devices, and the slices or processes that hold them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Groups = tuple[tuple[int, ...], ...]


class DeviceLayout(NamedTuple):
    """Axes of a mesh, and the device at each of its positions.

    Attributes:
      sizes: sizes of the mesh axes, outermost first.
      device_ids: id of the device at each position; empty if they are not known.
      slices: index of the TPU slice, or of the process of other devices, for each
        position; empty if the devices are not known.
    """

    sizes: Mapping[str, int]
    device_ids: tuple[int, ...] = ()
    slices: tuple[int, ...] = ()

    @property
    def num_slices(self) -> int:
        """Number of TPU slices, or of processes of other devices."""
        return len(set(self.slices)) or 1

    @property
    def size(self) -> int:
        """Number of positions."""
        return math.prod(self.sizes.values())


def make_layout(mesh: Any) -> DeviceLayout | None:
    """Returns the layout of a mesh.

    Args:
      mesh: a mesh, with or without devices, or the sizes of its axes by name; None
        if no mesh is known.

    Returns:
      The layout, or None.

    Example:
      >>> make_layout({"worker": 2, "model": 4}).size
      8
    """
    if mesh is None or isinstance(mesh, DeviceLayout):
        return mesh
    if isinstance(mesh, Mapping):
        return DeviceLayout(dict(mesh))
    grid = getattr(mesh, "devices", None) if _has_devices(mesh) else None
    devices = [] if grid is None else list(np.ravel(grid))
    return DeviceLayout(
        dict(mesh.shape),
        tuple(device.id for device in devices),
        _slices_of(devices),
    )


def count_devices(layout: DeviceLayout, num_partitions: int) -> int:
    """Returns the number of devices that run a module.

    A program for several TPU slices is compiled into one module per slice.

    Args:
      layout: the mesh.
      num_partitions: number of devices in the header of the module.

    Returns:
      The number of devices of all slices.
    """
    if _is_module_of_one_slice(layout, num_partitions):
        return layout.size
    return num_partitions


def global_groups(groups: Groups, layout: DeviceLayout, num_partitions: int) -> Groups:
    """Converts the replica groups of a module to positions of the mesh.

    In a program for several TPU slices, the module of a slice numbers its devices
    0, 1, 2, … in the order of the mesh. Each group stands for one group per slice.

    Args:
      groups: replica groups of an instruction.
      layout: the mesh.
      num_partitions: number of devices in the header of the module.

    Returns:
      Groups of positions.

    Example:
      >>> layout = DeviceLayout({"fsdp": 2, "worker": 2}, (8, 9, 7, 6), (0, 1, 0, 1))
      >>> global_groups(((0, 1),), layout, num_partitions=2)
      ((0, 2), (1, 3))
    """
    if not _is_module_of_one_slice(layout, num_partitions):
        return groups
    positions = [
        [position for position, each in enumerate(layout.slices) if each == one]
        for one in sorted(set(layout.slices))
    ]
    return tuple(
        tuple(members[local] for local in group)
        for members in positions
        for group in groups
    )


def position_groups(id_groups: Iterable[Sequence[int]], layout: DeviceLayout) -> Groups:
    """Converts groups of device ids to positions of the mesh.

    Args:
      id_groups: groups of device ids.
      layout: the mesh.

    Returns:
      Groups of positions.

    Raises:
      NotImplementedError: if an id is not in the mesh.
    """
    positions = {number: index for index, number in enumerate(layout.device_ids)}
    try:
        return tuple(tuple(positions[number] for number in ids) for ids in id_groups)
    except KeyError as error:
        raise NotImplementedError(f"device {error} outside the mesh") from None


def _is_module_of_one_slice(layout: DeviceLayout, num_partitions: int) -> bool:
    """Returns whether a module is that of one of several slices of equal size."""
    counts = {layout.slices.count(each) for each in set(layout.slices)}
    return layout.num_slices > 1 and counts == {num_partitions}


def _has_devices(mesh: Any) -> bool:
    """Returns whether a mesh is concrete; `AbstractMesh.devices` raises."""
    try:
        return mesh.devices is not None
    except (AttributeError, ValueError):
        return False


def _slices_of(devices: Sequence[Any]) -> tuple[int, ...]:
    """Returns the index of the slice of each device, else that of its process.

    `worker_mesh` groups devices by the same rule. A TPU slice may have several
    processes, all of whose devices are on ICI.
    """
    slices = tuple(getattr(device, "slice_index", 0) for device in devices)
    if len(set(slices)) > 1 or all(device.platform == "tpu" for device in devices):
        return slices
    return tuple(device.process_index for device in devices)
