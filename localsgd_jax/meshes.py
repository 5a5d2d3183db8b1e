"""Meshes whose worker axis runs across the slow links: between hosts and slices."""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from localsgd_jax import checks


def worker_mesh(
    workers: int | None = None,
    *,
    axis: str = "worker",
    within: Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes a mesh with the workers across slices and hosts, and the rest inside.

    Workers talk once a round, the devices of one worker at every step. So the worker
    axis comes first and separates slices (of TPUs, where there are several) or else
    processes, and a worker's own axes take devices that are near each other.

    Args:
      workers: K, if as many devices are to be used as K is a multiple of the places
        on them, the same number in every slice or process; None for all devices.
      axis: name of the worker axis.
      within: names and sizes of the axes inside a worker, such as `{"model": 2}`.
      devices: of all processes, `jax.devices()` if None.

    Returns:
      A mesh with automatic axes, for `on_mesh`.

    Raises:
      TypeError: if an axis has no name, or a size or K is not an int.
      ValueError: if K cannot be spread evenly, the devices do not divide into
        workers, there are none, or a device or an axis comes twice.

    Example:
      >>> import localsgd_jax as lsgd
      >>> mesh = lsgd.worker_mesh(workers=jax.device_count())
      >>> mesh.axis_names
      ('worker',)
    """
    inside = _inside(axis, within)
    each = math.prod(inside.values())
    devices = _distinct(jax.devices() if devices is None else devices)
    groups = _near(devices)
    sizes = {len(group) for group in groups}
    if len(sizes) == 1 and sizes.pop() % each == 0:
        places = len(groups[0]) // each
        if workers is not None:
            places = _places(workers, len(groups), places)
        shape = (places, *inside.values())
        blocks = [_block(group, shape) for group in groups]
        grid = np.concatenate(blocks)
    elif len(devices) % each == 0 and workers is None:
        # A worker larger than a process: whole processes, one after another.
        ordered = [device for group in groups for device in group]
        grid = _array(ordered).reshape(-1, *inside.values())
    else:
        raise ValueError(
            f"worker_mesh(within): workers of {each} devices must divide the "
            f"{len(devices)} devices evenly, and with `workers` those of every process "
            f"or slice, got {[len(group) for group in groups]} devices in them"
        )
    kinds = (AxisType.Auto,) * grid.ndim
    return Mesh(grid, (axis, *inside), axis_types=kinds)


def among(mesh: Mesh, devices: Iterable, axis: str | Sequence[str] = "worker") -> Mesh:
    """Keeps the places of a mesh whose devices are all among those given.

    Args:
      mesh: any mesh.
      devices: such as those of one process, or of all that are alive.
      axis: the worker axis, or several; places go along the outermost.

    Returns:
      A mesh of the same axes, automatic ones.

    Raises:
      ValueError: if no place is left.

    Example:
      >>> import jax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("worker",))
      >>> among(mesh, jax.devices()[:1]).size
      1
    """
    along = mesh.axis_names.index(axis if isinstance(axis, str) else axis[0])
    places, wanted = np.moveaxis(mesh.devices, along, 0), set(devices)
    kept = [i for i, place in enumerate(places) if wanted.issuperset(np.ravel(place))]
    if not kept:
        raise ValueError(
            f"among(mesh, devices): no place of {mesh.shape} has all its devices among "
            f"the {len(wanted)} given"
        )
    kinds = (AxisType.Auto,) * mesh.devices.ndim
    return Mesh(np.take(mesh.devices, kept, along), mesh.axis_names, axis_types=kinds)


def _inside(axis: str, within: Mapping[str, int] | None) -> dict[str, int]:
    """Returns the axes inside a worker; refuses names and sizes that no mesh has."""
    if within is not None and not isinstance(within, Mapping):
        raise TypeError(
            f"worker_mesh(within): it must map names of axes to sizes, got {within!r}"
        )
    inside = dict(within or {})
    for call, name in [("axis", axis), *(("within", name) for name in inside)]:
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"worker_mesh({call}): an axis must have a name, got {name!r}"
            )
    if axis in inside:
        raise ValueError(
            f"worker_mesh(within): {axis!r} is the worker axis already, got {inside}"
        )
    for size in inside.values():
        checks.integer("worker_mesh(within)", "the size of an axis", size, 1)
    return inside


def _distinct(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Returns devices as a list; refuses none, and one that comes twice."""
    found = list(devices)
    if not found:
        raise ValueError("worker_mesh(devices): at least one is needed, got none")
    for number, device in enumerate(found):
        if any(device is other for other in found[:number]):
            raise ValueError(
                f"worker_mesh(devices): each may come once, got {device} again"
            )
    return found


def _near(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Groups devices by slice if there are several, else by process."""
    by_slice = len({getattr(device, "slice_index", 0) for device in devices}) > 1
    name = "slice_index" if by_slice else "process_index"
    groups = collections.defaultdict(list)
    for device in devices:
        groups[getattr(device, name)].append(device)
    return [groups[key] for key in sorted(groups)]


def _places(workers: int, groups: int, most: int) -> int:
    """Returns how many places each group offers, so that K is a multiple of all."""
    checks.integer("worker_mesh(workers)", "the number of workers", workers, 1)
    if workers % groups:
        raise ValueError(
            f"worker_mesh(workers): workers must be a multiple of the {groups} "
            f"processes or slices, got {workers}"
        )
    share = workers // groups
    return next(n for n in range(min(share, most), 0, -1) if share % n == 0)


def _block(group: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """Lays out the devices of one group, along the links that they have."""
    wanted = math.prod(shape)
    if wanted < len(group):
        return _array(group[:wanted]).reshape(shape)
    return mesh_utils.create_device_mesh(shape, group)


def _array(devices: Sequence[jax.Device]) -> np.ndarray:
    """Returns devices as an array."""
    return np.array(devices, dtype=object)
