"""Ambient meshes set by the user, replaced by the automatic mesh of the workers.

Under `jax.set_mesh` with explicit axes, JAX rejects operations on arrays whose mesh has
automatic axes, such as the state of a cluster.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh

from localsgd_jax.core.types import Cluster, PyTree, State
from localsgd_jax.distributed.meshes import NO_MESH, ambient_mesh

Args = ParamSpec("Args")
Result = TypeVar("Result")


def in_mesh(mesh: Mesh, cluster: Cluster) -> Cluster:
    """Makes the functions of a cluster independent of the ambient mesh.

    Args:
      mesh: mesh of the cluster, with automatic axes.
      cluster: functions of the workers.

    Returns:
      The same functions; each runs, and is traced, with `mesh` as the ambient mesh if
      `jax.set_mesh` has set another one.
    """

    def enter(function: Callable) -> Callable:
        @functools.wraps(function)
        def inside(*args, **kwargs):
            with ambient_mesh(mesh.abstract_mesh):
                return function(*args, **kwargs)

        return inside

    return cluster._replace(
        init=enter(cluster.init),
        step=enter(cluster.step),
        sync=enter(cluster.sync),
        shard_batch=enter(cluster.shard_batch),
        # It traces the rule with a mesh of the axes inside a worker only.
        bytes_sent=without_mesh(cluster.bytes_sent),
        sync_if=enter(cluster.sync_if),
    )


def in_mesh_of_state(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """Runs a function with the mesh of its `State` argument as the ambient mesh.

    Args:
      function: has an argument that is a `State`, concrete or traced.

    Returns:
      A function of the same arguments. It does nothing else if no mesh is set or the
      state is not on a mesh.
    """

    @functools.wraps(function)
    def inside(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        values = (*args, *kwargs.values())
        states = [value for value in values if isinstance(value, State)]
        with ambient_mesh(_mesh_of(states)):
            return function(*args, **kwargs)

    return inside


def without_mesh(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """Runs a function without an ambient mesh, for arrays of several meshes.

    Args:
      function: any function.

    Returns:
      A function of the same arguments.
    """

    @functools.wraps(function)
    def outside(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        with ambient_mesh(NO_MESH):
            return function(*args, **kwargs)

    return outside


def explain_automatic_axes(step: Callable) -> Callable:
    """Adds the remedy to errors of explicit shardings in a training step.

    Args:
      step: `step(worker, batch) -> (worker, metrics)`.

    Returns:
      The same function; `out_sharding` and `reshard` over an axis inside a worker raise
      a ValueError with the alternatives.
    """

    @functools.wraps(step)
    def explained(worker: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        try:
            return step(worker, batch)
        except ValueError as error:
            if "of type Auto" not in str(error):
                raise
            raise ValueError(
                "step(state, batch): mesh axes are automatic inside a worker; replace "
                "out_sharding= and reshard by jax.lax.with_sharding_constraint(x, spec)"
                ", or wrap the function in jax.sharding.explicit_axes, got the error: "
                f"{str(error).splitlines()[0]}"
            ) from error

    return explained


def _mesh_of(tree: PyTree) -> AbstractMesh | None:
    """Returns the mesh of the first leaf on a mesh, or None."""
    for leaf in jax.tree.leaves(tree):
        mesh = jax.typeof(leaf).sharding.mesh
        if not mesh.empty:
            return mesh
    return None
