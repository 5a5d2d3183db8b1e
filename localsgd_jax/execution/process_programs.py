"""Compiled programs of process-local execution, and array views between meshes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from localsgd_jax.core.types import Cluster, PyTree, State
from localsgd_jax.execution.mean_model import mean_over_workers


@dataclass(frozen=True)
class SubCluster:
    """Cluster on a sub-mesh, with zero-copy views of arrays.

    A view reinterprets the shards that this process holds as shards of an array on
    another mesh. The local mesh and the meshes of groups of processes thereby share
    the same buffers.

    Attributes:
      mesh: sub-mesh of the mesh of all processes.
      cluster: cluster of the workers on the sub-mesh.
      axes: names of the worker axes, outermost first.
    """

    mesh: Mesh
    cluster: Cluster
    axes: tuple[str, ...]

    def view(self, state: State) -> State:
        """Views a state on this mesh, with the workers of this cluster."""
        replicated = self.view_replicated(state._replace(workers=(), local=()))
        return replicated._replace(
            workers=self.view_rows(state.workers), local=self.view_rows(state.local)
        )

    def view_replicated(self, tree: PyTree) -> PyTree:
        """Views leaves without worker axis on this mesh."""

        def leaf(x: Any) -> jax.Array:
            return _from_shards(x.shape, NamedSharding(self.mesh, x.sharding.spec), x)

        return jax.tree.map(leaf, tree)

    def view_rows(self, tree: PyTree) -> PyTree:
        """Views leaves with worker axis as rows on this mesh."""

        def leaf(x: Any) -> jax.Array:
            # On a mesh of one device, programs drop the worker axes from the sharding.
            sharding = NamedSharding(self.mesh, P(self.axes, *x.sharding.spec[1:]))
            return _from_shards((self.cluster.num_workers, *x.shape[1:]), sharding, x)

        return jax.tree.map(leaf, tree)

    def stack_reports(self, report: Sequence[float] | np.ndarray) -> jax.Array:
        """Stacks the reports of all positions in a sharded array."""
        row = np.asarray(report, np.float32)[None]
        sharding = NamedSharding(self.mesh, P(self.axes[0]))
        return jax.make_array_from_single_device_arrays(
            (self.mesh.shape[self.axes[0]], row.size),
            sharding,
            [jax.device_put(row, device) for device in sharding.addressable_devices],
        )

    @cached_property
    def process_of_position(self) -> np.ndarray:
        """Index of the process at each position along the outermost worker axis.

        Raises:
          ValueError: if a position has devices of several processes, or the positions
            of a process are not contiguous.
        """
        along = self.mesh.axis_names.index(self.axes[0])
        grid = np.vectorize(lambda device: device.process_index)(self.mesh.devices)
        grid = np.moveaxis(grid, along, 0).reshape(grid.shape[along], -1)
        processes = grid[:, 0]
        if (grid != processes[:, None]).any():
            raise ValueError(
                "on_processes(mesh): each position along the axis "
                f"{self.axes[0]!r} must belong to one process, got the processes "
                f"{grid.tolist()}"
            )
        if 1 + np.count_nonzero(np.diff(processes)) > len(set(processes.tolist())):
            raise ValueError(
                "on_processes(mesh): the positions of a process must be contiguous "
                f"along the axis {self.axes[0]!r}, got the processes "
                f"{processes.tolist()}"
            )
        return processes

    @cached_property
    def first_positions(self) -> np.ndarray:
        """First position of each process, in the order of the mesh."""
        return np.sort(np.unique(self.process_of_position, return_index=True)[1])


class ProcessPrograms:
    """Compiled programs of one process, cached per group of participating processes."""

    def __init__(
        self, sub_cluster: Callable[[tuple], SubCluster], local: SubCluster
    ) -> None:
        """Stores the clusters; programs are compiled on first use.

        Args:
          sub_cluster: returns the sub-cluster of a tuple of devices.
          local: sub-cluster of this process.
        """
        self.sub_cluster, self.local = sub_cluster, local
        self._programs: dict[tuple, Callable] = {}

    def local_steps(self, state: State, batches: PyTree) -> tuple[State, PyTree]:
        """Takes the local steps of the workers of this process."""

        def steps(state: State, batches: PyTree) -> tuple[State, PyTree]:
            return jax.lax.scan(self.local.cluster.step, state, batches)

        program = self._compile("local_steps", steps, (shardings_of(state), None))
        return program(state, batches)

    def sync(
        self,
        devices: tuple,
        state: State,
        report: Sequence[float] | np.ndarray,
        weighted: bool,
    ) -> tuple[State, np.ndarray]:
        """Synchronises with the processes of some devices and gathers their reports."""
        group = self.sub_cluster(devices)

        def sync_program(state: State, reports: jax.Array) -> tuple[State, jax.Array]:
            repeats = group.cluster.num_workers // len(reports)
            weight = jnp.repeat(_relative(reports[:, 0]), repeats) if weighted else None
            return group.cluster.sync(state, weight), reports

        state = group.view(state)
        out = shardings_of(state), NamedSharding(group.mesh, P())
        program = self._compile(f"sync weighted={weighted}", sync_program, out)
        state, reports = jax.block_until_ready(
            program(state, group.stack_reports(report))
        )
        rows = np.asarray(reports.addressable_data(0))[group.first_positions]
        return self.local.view(state), rows

    def mean(self, devices: tuple, tree: PyTree) -> PyTree:
        """Averages leaves with worker axis over the workers of some devices."""
        group = self.sub_cluster(devices)
        rows = group.view_rows(tree)
        out = jax.tree.map(
            lambda x: NamedSharding(group.mesh, P(*x.sharding.spec[1:])), rows
        )
        program = self._compile("mean", mean_over_workers, out)
        return self.local.view_replicated(jax.block_until_ready(program(rows)))

    def _compile(self, name: str, program: Callable, out: PyTree) -> Callable:
        """Returns the jitted program of a name and output shardings, compiled once.

        The output shardings are fixed, since views between meshes rely on them; the
        compiler must not choose others.
        """
        leaves, structure = jax.tree.flatten(out)
        key = (name, structure, *leaves)
        if key not in self._programs:
            self._programs[key] = jax.jit(program, out_shardings=out)
        return self._programs[key]


def shardings_of(tree: PyTree) -> PyTree:
    """Returns the sharding of each leaf."""
    return jax.tree.map(lambda x: x.sharding, tree)


def _from_shards(shape: tuple, sharding: NamedSharding, x: jax.Array) -> jax.Array:
    """Creates an array from the local shards of another array, without copying."""
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _relative(weights: jax.Array) -> jax.Array:
    """Divides weights by the largest, so that equal weights are exactly 1."""
    largest = jnp.max(weights)
    return weights / jnp.where(largest > 0, largest, 1)
