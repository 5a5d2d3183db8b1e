"""Assignment of workers to mesh positions and lanes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from localsgd_jax.core.types import PyTree, VmapAxis
from localsgd_jax.distributed import arrays

LANE = VmapAxis("lane")


@dataclass(frozen=True)
class Layout:
    """Assignment of K workers to mesh positions and lanes.

    A position is one index of the worker axes of the mesh. A lane is one of several
    workers that are vmapped on one position. Without a mesh there is one position,
    whose lanes are all workers.

    Attributes:
      mesh: device mesh with automatic axes; None for a single device.
      axes: number of workers along each worker axis, outermost first, lanes included.
      lanes: size of each vmap axis at one position, outermost first.
    """

    mesh: Mesh | None
    axes: Mapping[str, int]
    lanes: Mapping[VmapAxis, int]

    @classmethod
    def on_device(cls, names: Sequence[str], sizes: Sequence[int]) -> "Layout":
        """Creates a layout on one device, with a vmap axis per worker axis."""
        axes = dict(zip(names, sizes, strict=True))
        return cls(None, axes, {VmapAxis(name): size for name, size in axes.items()})

    @classmethod
    def on_mesh(cls, mesh: Mesh, names: Sequence[str], lanes: int) -> "Layout":
        """Creates a layout on a mesh, with lanes along the innermost worker axis."""
        # Explicit axes, the default of jax.make_mesh, reject unplaced batches and user
        # code that combines arrays of different shardings.
        kinds = (AxisType.Auto,) * mesh.devices.ndim
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
        axes = {name: mesh.shape[name] for name in names}
        axes[names[-1]] *= lanes
        return cls(mesh, axes, {LANE: lanes})

    @property
    def num_workers(self) -> int:
        """Number of workers K."""
        return math.prod(self.axes.values())

    @property
    def workers_per_position(self) -> int:
        """Number of lanes at each position."""
        return math.prod(self.lanes.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the worker axes, outermost first."""
        return tuple(self.axes)

    @property
    def carriers(self) -> dict[str, tuple[str, ...]]:
        """Mesh and vmap axes of each worker axis, for `SyncContext.axes`."""
        if self.mesh is None:
            return {name: (VmapAxis(name),) for name in self.axes}
        last = self.names[-1]
        return {name: (name,) for name in self.axes} | {last: (last, *self.lanes)}

    def split(self, tree: PyTree) -> PyTree:
        """Splits the leading axis of leaves into the vmap axes."""
        grid = tuple(self.lanes.values())
        return jax.tree.map(lambda x: x.reshape(*grid, *x.shape[1:]), tree)

    def join(self, tree: PyTree) -> PyTree:
        """Merges the vmap axes into one leading axis; the inverse of `split`."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(self.lanes) :]), tree)

    def shared_sharding(self, x: Any) -> NamedSharding:
        """Returns the sharding of a leaf replicated over workers.

        Axes inside a worker, over which `x` is sharded already, are kept.
        """
        return NamedSharding(self._mesh, P(*self._inner_spec(x)))

    def worker_sharding(self, x: Any) -> NamedSharding:
        """Returns the sharding of K copies of a leaf, `(K, ...)`."""
        return NamedSharding(self._mesh, P(self.names, *self._inner_spec(x)))

    def batch_sharding(self, time: bool = False) -> NamedSharding | None:
        """Returns the sharding of batch leaves, `(K, ...)` or `(H, K, ...)`."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, P(None, self.names) if time else P(self.names))

    def local_rows(self, time: bool = False) -> np.ndarray:
        """Returns the indices of the workers of this process, ascending."""
        return arrays.local_rows(self.batch_sharding(time), self.num_workers, int(time))

    @property
    def _mesh(self) -> Mesh:
        """The mesh; raises without one."""
        if self.mesh is None:
            raise ValueError("Layout: a single device has no shardings")
        return self.mesh

    def _inner_spec(self, x: Any) -> list[tuple[str, ...]]:
        """Returns the partition of a leaf over the axes inside a worker."""
        sharding = getattr(x, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return []
        inner = set(self._mesh.axis_names) - set(self.axes)
        return [
            tuple(name for name in as_tuple(entry) if name in inner)
            for entry in sharding.spec
        ]


def as_tuple(value: Any) -> tuple:
    """Converts a single name or size to a tuple of one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)
