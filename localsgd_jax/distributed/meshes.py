"""Device meshes with the worker axis across hosts and slices."""

import collections
import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from localsgd_jax.core import validation

NO_MESH = AbstractMesh((), ())
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
    devices. A worker with more devices than a slice or process consists of consecutive
    whole ones, and its first inner axis crosses them.

    Args:
      workers: K. The mesh then has the largest number of positions that divides K,
        equal in every slice or process unless a worker spans several of them. None for
        one position per worker on all devices.
      axis: name of the worker axis.
      inner_axes: names and sizes of the axes inside a worker, such as `{"model": 2}`.
      devices: devices of all processes; None for `jax.devices()`.

    Returns:
      A mesh with `AxisType.Auto` axes, for `on_mesh`.

    Raises:
      TypeError: if an axis name is not a non-empty string, a size or K is not an int,
        or `devices` is not a sequence of devices.
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
    size = sizes.pop() if len(sizes) == 1 else None
    is_inside = all(len(group) % devices_per_worker == 0 for group in groups)
    fills_slices = len(devices) % devices_per_worker == 0 and (
        devices_per_worker % (size or len(devices)) == 0
    )
    if size and is_inside:
        grid = _workers_in_groups(groups, workers, tuple(inner.values()))
    elif (size and fills_slices) or (workers is None and (is_inside or fills_slices)):
        grid = _workers_across_groups(groups, workers, tuple(inner.values()))
    else:
        raise ValueError(
            f"worker_mesh(inner_axes): workers of {devices_per_worker} devices must "
            "divide the devices of every process or slice, or consist of whole ones, "
            f"got groups of {[len(group) for group in groups]} devices"
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


def ambient_mesh(mesh: AbstractMesh | None) -> contextlib.AbstractContextManager:
    """Returns a context in which `jax.set_mesh` of the user has no effect.

    JAX rejects operations on arrays of one mesh while another mesh is set.

    Args:
      mesh: mesh that is set instead; an empty one allows arrays of any mesh, None
        changes nothing.

    Returns:
      A context manager, also for traced code. It does nothing unless another mesh is
      set.
    """
    current = jax.sharding.get_abstract_mesh()
    is_manual = AxisType.Manual in current.axis_types
    if mesh is None or current.empty or is_manual or current == mesh:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


def _check_inner_axes(axis: str, inner_axes: Mapping[str, int] | None) -> dict:
    """Returns the inner axes as a dict after checking names and sizes."""
    if inner_axes is not None:
        call = "worker_mesh(inner_axes)"
        validation.check_type(call, "inner_axes", inner_axes, Mapping)
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
    call = "worker_mesh(devices)"
    validation.check_type(call, "devices", devices, Iterable)
    checked = list(devices)
    if not checked:
        raise ValueError("worker_mesh(devices): must not be empty, got 0 devices")
    seen = set()
    for device in checked:
        if not hasattr(device, "process_index"):
            raise TypeError(
                f"worker_mesh(devices): must be a sequence of devices, got {device!r}"
            )
        # Compared by identity, so that device objects need not be hashable.
        if id(device) in seen:
            raise ValueError(
                f"worker_mesh(devices): must be distinct, got {device} twice"
            )
        seen.add(id(device))
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


def _workers_in_groups(
    groups: Sequence[Sequence[Device]], workers: int | None, inner: tuple[int, ...]
) -> np.ndarray:
    """Arranges workers that are smaller than a group, equally many in each."""
    positions = len(groups[0]) // math.prod(inner)
    if workers is not None:
        positions = _positions_per_group(workers, len(groups), positions)
    blocks = [_device_block(group, (positions, *inner)) for group in groups]
    return np.concatenate(blocks)


def _workers_across_groups(
    groups: Sequence[Sequence[Device]], workers: int | None, inner: tuple[int, ...]
) -> np.ndarray:
    """Arranges workers of consecutive groups; the outermost inner axis crosses them."""
    ordered = np.concatenate([_device_block(group, (len(group),)) for group in groups])
    positions = len(ordered) // math.prod(inner)
    if workers is not None:
        positions = _positions_per_group(workers, 1, positions)
    return ordered[: positions * math.prod(inner)].reshape(positions, *inner)


def _device_block(group: Sequence[Device], shape: tuple[int, ...]) -> np.ndarray:
    """Arranges the first devices of a group by their physical topology."""
    kept = group[: math.prod(shape)]
    try:
        return mesh_utils.create_device_mesh(
            shape, kept, allow_split_physical_axes=True
        )
    except (AssertionError, NotImplementedError):
        # The coordinates are no cuboid, such as those of a part of a slice.
        return _object_array(kept).reshape(shape)


def _object_array(devices: Sequence[Device]) -> np.ndarray:
    """Returns devices as a one-dimensional object array."""
    return np.array(devices, dtype=object)
