"""Replica groups of HLO collectives and the mesh axes along which they extend."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from localsgd_jax.analysis.device_layout import Groups

_IOTA = re.compile(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", re.ASCII
)
_MESH_AXES = re.compile(r"replica_groups=mesh\[(.*?)\] ?\{([^}]*)\}")
_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[^}]*\},?)*)\}")
_AXIS_REFERENCE = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def parse_replica_groups(attributes: str, num_devices: int) -> Groups:
    """Parses the replica groups of a collective.

    All textual forms that XLA prints are accepted:

        {{0,1},{2,3}}                     lists; {} stands for all devices
        [2,2]<=[4], [2,2]<=[2,2]T(1,0)    0, 1, 2, … reshaped, transposed, split in rows
        mesh['a'=2,'b'=2] {'b'}           along mesh axes, 'b':(1)2 is a part of an axis

    Each source–target pair of a permutation is a group of two.

    Args:
      attributes: attributes of the instruction.
      num_devices: number of devices that run the module.

    Returns:
      Groups of device positions in mesh order.

    Raises:
      NotImplementedError: if the form is unknown.

    Example:
      >>> parse_replica_groups("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", 4)
      ((0, 2), (1, 3))
      >>> parse_replica_groups("replica_groups=mesh['a'=2,'b'=2] {'b'}", 4)
      ((0, 1), (2, 3))
    """
    if match := _IOTA.search(attributes):
        shape, source, order = (
            [*map(int, re.findall(r"\d+", numbers or ""))] for numbers in match.groups()
        )
        positions = np.arange(math.prod(source)).reshape(source)
        positions = positions.transpose(order or range(len(source)))
        return _as_tuples(positions.reshape(shape[0], -1).tolist())
    if (match := _MESH_AXES.search(attributes)) and "device_ids" not in match[1]:
        pairs = re.findall(r"'([^']+)'=(\d+)", match[1])
        sizes = {name: int(size) for name, size in pairs}
        return _groups_of_axes(sizes, _AXIS_REFERENCE.findall(match[2]))
    if match := _LISTS.search(attributes):
        lists = re.findall(r"\{([^}]*)\}", match[1])
        groups = [[*map(int, filter(None, one.split(",")))] for one in lists]
        return _as_tuples(groups) if groups else (tuple(range(num_devices)),)
    if "replica_groups=" in attributes:
        raise NotImplementedError(
            f"replica groups of unknown form: {attributes.strip(', ')[:80]!r}"
        )
    return (tuple(range(num_devices)),)


def varying_axes(groups: Groups, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which groups extend.

    Args:
      groups: device positions in mesh order.
      sizes: sizes of the mesh axes, outermost first.

    Returns:
      Each axis whose coordinate differs within a group.

    Raises:
      ValueError: if a group contains a position outside the mesh.

    Example:
      >>> varying_axes(((0, 1), (2, 3)), {"worker": 2, "model": 2})
      ('model',)
    """
    num_positions = math.prod(sizes.values())
    largest = max(itertools.chain(*groups), default=0)
    if largest >= num_positions:
        raise ValueError(
            f"collective_ops(mesh): a mesh of {num_positions} devices is too small for "
            f"a program with device {largest}"
        )
    shape = tuple(sizes.values())
    varies = np.zeros(len(shape), bool)
    for group in groups:
        coordinates = np.stack(np.unravel_index(list(group), shape))
        varies |= (coordinates != coordinates[:, :1]).any(axis=1)
    return tuple(name for name, differs in zip(sizes, varies, strict=True) if differs)


def _groups_of_axes(
    sizes: Mapping[str, int], references: Sequence[tuple[str, str, str]]
) -> Groups:
    """Groups the mesh positions that differ only along (parts of) axes."""
    groups: dict[tuple, list[int]] = {}
    for position, coordinates in enumerate(np.ndindex(*sizes.values())):
        rest = dict(zip(sizes, coordinates, strict=True))
        for name, major_size, size in references:
            count = int(size or sizes[name])
            stride = sizes[name] // (int(major_size or 1) * count)
            rest[name] -= rest[name] // stride % count * stride
        groups.setdefault(tuple(rest.values()), []).append(position)
    return _as_tuples(groups.values())


def _as_tuples(groups: Iterable[Iterable[int]]) -> Groups:
    """Converts groups to tuples."""
    return tuple(tuple(group) for group in groups)
