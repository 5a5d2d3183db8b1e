"""Assignment of workers to mesh positions and lanes."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from localsgd_jax.core import validation
from localsgd_jax.core.pytrees import is_key
from localsgd_jax.core.types import PyTree, State, VmapAxis
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
    def inner_axes(self) -> dict[str, int]:
        """Names and sizes of the mesh axes inside a worker."""
        sizes = {} if self.mesh is None else dict(self.mesh.shape)
        return {name: size for name, size in sizes.items() if name not in self.axes}

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
        count = self.workers_per_position
        return jax.tree.map(
            lambda x: x.reshape(count, *x.shape[len(self.lanes) :]), tree
        )

    def shared_sharding(self, x: Any) -> NamedSharding:
        """Returns the sharding of a leaf replicated over workers.

        Axes inside a worker, over which `x` is sharded already, are kept.
        """
        return NamedSharding(self._mesh, P(*self._inner_spec(x)))

    def inner_sharding(self, spec: P) -> NamedSharding:
        """Returns the sharding of a leaf of one worker, replicated over workers."""
        return NamedSharding(self._mesh, spec)

    def inner_specs(self, tree: PyTree) -> PyTree | None:
        """Returns the partition of each leaf over the axes inside a worker.

        Returns:
          A tree of `PartitionSpec`s; None if a worker is one device.
        """
        if not self.inner_axes:
            return None
        return jax.tree.map(lambda x: P(*self._inner_spec(x)), tree)

    def state_shardings(
        self, state: State, rows: str | tuple[str, ...] | None = ()
    ) -> State:
        """Returns the sharding of each leaf of a state.

        Args:
          state: arrays or abstract arrays, with a worker axis where a `State` has one.
          rows: mesh axes over which the worker axis is split; None if it is not split,
            () for the worker axes.

        Returns:
          A state of `NamedSharding`s.
        """
        rows = self.names if rows == () else rows
        specs = state.specs

        def shard(part: PyTree, specs: Sequence[P] | None, *leading: Any) -> PyTree:
            structure = jax.tree.structure(part)
            specs = [P()] * structure.num_leaves if specs is None else specs
            shardings = [NamedSharding(self._mesh, P(*leading, *s)) for s in specs]
            return structure.unflatten(shardings)

        replicated = NamedSharding(self._mesh, P())
        return state._replace(
            step=replicated,
            # A number with a static residue is a pytree of one leaf.
            round=jax.tree.map(lambda leaf: replicated, state.round),
            workers=shard(state.workers, specs and specs.workers, rows),
            local=shard(state.local, specs and specs.local, rows),
            shared=shard(state.shared, specs and specs.shared),
        )

    def constrain(self, state: State) -> State:
        """Keeps the sharding of a traced state that is sharded inside a worker.

        Otherwise the compiler chooses the sharding of results, and another choice
        than that of the arguments compiles the next step again.
        """
        if state.specs is None:
            return state
        return jax.tree.map(
            lambda x, sharding: (
                x if is_key(x) else jax.lax.with_sharding_constraint(x, sharding)
            ),
            state,
            self.state_shardings(state),
        )

    def ambient_inner(self) -> contextlib.AbstractContextManager:
        """Returns a context with a mesh of the axes inside a worker only.

        In it, a function of one worker is traced without the other workers.
        """
        sizes = self.inner_axes
        if not sizes:
            return contextlib.nullcontext()
        automatic = (AxisType.Auto,) * len(sizes)
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=automatic)
        return jax.sharding.use_abstract_mesh(mesh)

    def ambient(self) -> contextlib.AbstractContextManager:
        """Returns a context in which the mesh is the ambient one of traced code."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

    def batch_sharding(self, time: bool = False) -> NamedSharding | None:
        """Returns the sharding of leaves `(K, ...)` or `(H, K, ...)` over workers."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, P(None, self.names) if time else P(self.names))

    def local_rows(self, time: bool = False) -> np.ndarray:
        """Returns the indices of the workers of this process, ascending."""
        shape = (*(1,) * int(time), self.num_workers)
        return arrays.local_rows(self.batch_sharding(time), shape, int(time))

    @property
    def _mesh(self) -> Mesh:
        """The mesh; raises without one."""
        if self.mesh is None:
            raise ValueError("Layout: a single device has no shardings")
        return self.mesh

    def _inner_spec(self, x: Any) -> list[str | tuple[str, ...] | None]:
        """Returns the partition of a leaf over the axes inside a worker."""
        sharding = getattr(x, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return []
        inner = set(self._mesh.axis_names) - set(self.axes)
        entries = [
            [name for name in axis_names(entry) if name in inner]
            for entry in sharding.spec
        ]
        while entries and not entries[-1]:
            entries.pop()
        return [
            tuple(names) if len(names) > 1 else names[0] if names else None
            for names in entries
        ]


def as_tuple(value: Any) -> tuple:
    """Converts a single name or size to a tuple of one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def axis_names(entry: Any) -> tuple:
    """Returns the mesh axes in an entry of a `PartitionSpec`."""
    return () if entry is None else as_tuple(entry)


def spec_divides(spec: P, shape: Sequence[int], sizes: Mapping[str, int]) -> bool:
    """Returns whether a `PartitionSpec` splits a shape into equal blocks.

    Args:
      spec: names of mesh axes for the first dimensions.
      shape: shape of the array.
      sizes: size of each mesh axis in `spec`.

    Returns:
      Whether the array has a dimension for each entry, and each is a multiple of its
      axes.
    """
    parts = [math.prod(sizes[name] for name in axis_names(entry)) for entry in spec]
    if len(parts) > len(shape):
        return False
    return all(n % k == 0 for n, k in zip(shape, parts, strict=False))


def check_mesh_axes(
    call: str, mesh: Mesh, axis: str | Sequence[str]
) -> tuple[str, ...]:
    """Returns the names of worker axes; raises unless a mesh has them.

    Args:
      call: name of the public call.
      mesh: the mesh.
      axis: name of the worker axis, or names.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if there are no names, or the mesh lacks one.
    """
    names = validation.check_names(f"{call}(axis)", "axis", axis)
    validation.check_type(f"{call}(mesh)", "mesh", mesh, Mesh)
    for name in names:
        text = f"it must be one of the axes {mesh.axis_names} of the mesh"
        validation.check(name in mesh.shape, f"{call}(axis)", text, repr(name))
    return names
