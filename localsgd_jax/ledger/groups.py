"""Who talks with whom: the device groups of a collective, and their mesh axes."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_IOTA = re.compile(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", re.ASCII
)
_AXES = re.compile(r"replica_groups=mesh\[(.*?)\] ?\{([^}]*)\}")
_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[^}]*\},?)*)\}")
_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def groups(attributes: str, devices: int) -> Groups:
    """Reads the groups of a collective, in each form that compilers print.

        {{0,1},{2,3}}                     lists; {} stands for all devices
        [2,2]<=[4], [2,2]<=[2,2]T(1,0)    0, 1, 2, … reshaped, transposed, cut into rows
        mesh['a'=2,'b'=2] {'b'}           along axes of a mesh, 'b':(1)2 a part of one

    A permutation's pairs of source and target count as groups of two.

    Args:
      attributes: of the instruction.
      devices: how many run the program.

    Returns:
      Groups of device positions, in the order of the mesh.

    Raises:
      NotImplementedError: if the form is another one.

    Example:
      >>> groups("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", 4)
      ((0, 2), (1, 3))
      >>> groups("replica_groups=mesh['a'=2,'b'=2] {'b'}", 4)
      ((0, 1), (2, 3))
    """
    if match := _IOTA.search(attributes):
        shape, source, order = (
            [*map(int, re.findall(r"\d+", x or ""))] for x in match.groups()
        )
        places = np.arange(math.prod(source)).reshape(source)
        places = places.transpose(order or range(len(source)))
        return _rows(places.reshape(shape[0], -1).tolist())
    if (match := _AXES.search(attributes)) and "device_ids" not in match[1]:
        sizes = re.findall(r"'([^']+)'=(\d+)", match[1])
        whole = {name: int(size) for name, size in sizes}
        return _along(whole, _PART.findall(match[2]))
    if match := _LISTS.search(attributes):
        lists = re.findall(r"\{([^}]*)\}", match[1])
        listed = [[*map(int, filter(None, one.split(",")))] for one in lists]
        return _rows(listed) if listed else (tuple(range(devices)),)
    if "replica_groups=" in attributes:
        raise NotImplementedError(
            f"ledger(program): replica groups of another form: {attributes[:120]!r}"
        )
    return (tuple(range(devices)),)


def axes(found: Groups, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Names the mesh axes along which groups spread.

    Args:
      found: the groups, by position in the mesh.
      sizes: of the axes of the mesh, outermost first.

    Returns:
      Each axis whose coordinate differs within a group.

    Raises:
      ValueError: if the mesh is smaller than the groups say.

    Example:
      >>> axes(((0, 1), (2, 3)), {"worker": 2, "model": 2})
      ('model',)
    """
    places, most = math.prod(sizes.values()), max(itertools.chain(*found), default=0)
    if most >= places:
        raise ValueError(
            f"ledger(mesh): a mesh of {places} devices is too small for a program that "
            f"names device {most}"
        )
    shape = tuple(sizes.values())
    varied = np.zeros(len(shape), bool)
    for group in found:
        where = np.stack(np.unravel_index(list(group), shape))
        varied |= (where != where[:, :1]).any(axis=1)
    return tuple(name for name, varies in zip(sizes, varied, strict=True) if varies)


def _along(sizes: Mapping[str, int], parts: Sequence[tuple[str, str, str]]) -> Groups:
    """Groups the devices of a mesh that differ only along (parts of) axes."""
    found: dict[tuple, list[int]] = {}
    for place, where in enumerate(np.ndindex(*sizes.values())):
        rest = dict(zip(sizes, where, strict=True))
        for name, before, size in parts:
            count = int(size or sizes[name])
            stride = sizes[name] // (int(before or 1) * count)
            rest[name] -= rest[name] // stride % count * stride
        found.setdefault(tuple(rest.values()), []).append(place)
    return _rows(found.values())


def _rows(lists) -> Groups:
    """Freezes lists of positions."""
    return tuple(tuple(one) for one in lists)
