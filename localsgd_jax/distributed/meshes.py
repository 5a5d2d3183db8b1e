"""Device meshes with the worker axis across hosts and slices."""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from localsgd_jax.core import validation

Device = Any  # `jax.Device` has no type stubs.


def worker_mesh(
    workers: int | None = None,
    *,
    axis: str = "worker",
    inner_axes: Mapping[str, int] | None = None,
    devices: Sequence[Device] | None = None,
) -> Mesh:
    """Builds a mesh with the worker axis across slices and hosts.

    Workers communicate once per round, the devices of one worker in every step.
    Therefore the worker axis is the outermost and separates slices (TPUs with several
    slices) or otherwise processes, and the inner axes of a worker span neighbouring
    devices.

    Args:
      workers: K. The mesh then has the largest number of positions that divides K,
        equal in every slice or process. None for one position per worker on all
        devices.
      axis: name of the worker axis.
      inner_axes: names and sizes of the axes inside a worker, such as `{"model": 2}`.
      devices: devices of all processes; None for `jax.devices()`.

    Returns:
      A mesh with `AxisType.Auto` axes, for `on_mesh`.

    Raises:
      TypeError: if an axis name is not a non-empty string, or a size or K is not an
        int.
      ValueError: if K is not a multiple of the slices or processes, the devices do not
        divide into workers, there are no devices, or a device or axis is repeated.

    Example:
      >>> import localsgd_jax as lsgd
      >>> mesh = lsgd.worker_mesh(workers=jax.device_count())
      >>> mesh.axis_names
      ('worker',)
    """
    inner = _check_inner_axes(axis, inner_axes)
    devices_per_worker = math.prod(inner.values())
    devices = _check_devices(jax.devices() if devices is None else devices)
    groups = _group_by_locality(devices)
    sizes = {len(group) for group in groups}
    if len(sizes) == 1 and sizes.pop() % devices_per_worker == 0:
        positions = len(groups[0]) // devices_per_worker
        if workers is not None:
            positions = _positions_per_group(workers, len(groups), positions)
        shape = (positions, *inner.values())
        grid = np.concatenate([_device_block(group, shape) for group in groups])
    elif len(devices) % devices_per_worker == 0 and workers is None:
        # A worker larger than a process consists of consecutive whole processes.
        ordered = [device for group in groups for device in group]
        grid = _object_array(ordered).reshape(-1, *inner.values())
    else:
        raise ValueError(
            f"worker_mesh(inner_axes): workers of {devices_per_worker} devices must "
            f"divide the {len(devices)} devices evenly, and with `workers` the devices "
            "of every process or slice, got groups of "
            f"{[len(group) for group in groups]} devices"
        )
    axis_types = (AxisType.Auto,) * grid.ndim
    return Mesh(grid, (axis, *inner), axis_types=axis_types)


def submesh(
    mesh: Mesh, devices: Iterable, axis: str | Sequence[str] = "worker"
) -> Mesh:
    """Returns the sub-mesh of the positions that lie within `devices`.

    Args:
      mesh: any mesh.
      devices: devices to keep, such as those of one process or of all live processes.
      axis: worker axis or axes; positions are counted along the outermost.

    Returns:
      A mesh with the same axis names and `AxisType.Auto` axes.

    Raises:
      ValueError: if no position remains.

    Example:
      >>> import jax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("worker",))
      >>> submesh(mesh, jax.devices()[:1]).size
      1
    """
    outermost = mesh.axis_names.index(axis if isinstance(axis, str) else axis[0])
    positions, kept_devices = np.moveaxis(mesh.devices, outermost, 0), set(devices)
    kept = [
        i
        for i, position in enumerate(positions)
        if kept_devices.issuperset(np.ravel(position))
    ]
    if not kept:
        raise ValueError(
            f"submesh(mesh, devices): no position of {mesh.shape} has all its devices "
            f"among the {len(kept_devices)} given"
        )
    grid = np.take(mesh.devices, kept, outermost)
    return Mesh(grid, mesh.axis_names, axis_types=(AxisType.Auto,) * grid.ndim)


def _check_inner_axes(axis: str, inner_axes: Mapping[str, int] | None) -> dict:
    """Returns the inner axes as a dict after checking names and sizes."""
    if inner_axes is not None and not isinstance(inner_axes, Mapping):
        raise TypeError(
            f"worker_mesh(inner_axes): must map axis names to sizes, got {inner_axes!r}"
        )
    inner = dict(inner_axes or {})
    for argument, name in [("axis", axis), *(("inner_axes", name) for name in inner)]:
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"worker_mesh({argument}): axis names must be non-empty strings, got "
                f"{name!r}"
            )
    if axis in inner:
        raise ValueError(
            f"worker_mesh(inner_axes): {axis!r} is already the worker axis, got {inner}"
        )
    for size in inner.values():
        validation.check_int("worker_mesh(inner_axes)", "the size of an axis", size, 1)
    return inner


def _check_devices(devices: Sequence[Device]) -> list[Device]:
    """Returns the devices as a list; raises if it is empty or has a duplicate."""
    checked = list(devices)
    if not checked:
        raise ValueError("worker_mesh(devices): must not be empty, got 0 devices")
    for i, device in enumerate(checked):
        # Compared by identity, so that device objects need not be hashable.
        if any(device is other for other in checked[:i]):
            raise ValueError(
                f"worker_mesh(devices): must be distinct, got {device} twice"
            )
    return checked


def _group_by_locality(devices: Sequence[Device]) -> list[list[Device]]:
    """Groups devices by slice if there are several slices, else by process."""
    by_slice = len({getattr(device, "slice_index", 0) for device in devices}) > 1
    name = "slice_index" if by_slice else "process_index"
    groups = collections.defaultdict(list)
    for device in devices:
        groups[getattr(device, name)].append(device)
    return [groups[key] for key in sorted(groups)]


def _positions_per_group(workers: int, num_groups: int, max_positions: int) -> int:
    """Returns the largest divisor of the workers per group that fits."""
    validation.check_int("worker_mesh(workers)", "the number of workers", workers, 1)
    if workers % num_groups:
        raise ValueError(
            f"worker_mesh(workers): must be a multiple of the {num_groups} processes "
            f"or slices, got {workers}"
        )
    per_group = workers // num_groups
    largest = min(per_group, max_positions)
    return next(n for n in range(largest, 0, -1) if per_group % n == 0)


def _device_block(group: Sequence[Device], shape: tuple[int, ...]) -> np.ndarray:
    """Arranges the devices of one group by their physical topology."""
    size = math.prod(shape)
    if size < len(group):
        return _object_array(group[:size]).reshape(shape)
    return mesh_utils.create_device_mesh(shape, group)


def _object_array(devices: Sequence[Device]) -> np.ndarray:
    """Returns devices as a one-dimensional object array."""
    return np.array(devices, dtype=object)
