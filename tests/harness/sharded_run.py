"""Runs with sharded workers and a different state on each worker."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd

SPECS = {"w": P("fsdp", "model"), "b": P(("fsdp", "model")), "scale": P()}
SIZES = {"w": (16, 24), "b": (48,), "scale": (3,)}


def make_cluster(workers, fsdp, model=1, rule=None, positions=None):
    """Returns a cluster with workers of `fsdp * model` devices each."""
    shape = (positions or workers, fsdp, model)
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("worker", "fsdp", "model"))
    algorithm = lsgd.local_sgd(
        lambda params, batch: jnp.mean(params["scale"]) * jnp.mean(batch),
        optax.adam(0.1),
        rule or lsgd.outer(optax.sgd(0.7, momentum=0.9), lsgd.average()),
    )
    return lsgd.on_mesh(algorithm, mesh, workers=workers), mesh


def initial_params(mesh):
    """Returns parameters that are sharded over the axes inside a worker."""
    rng = np.random.default_rng(0)
    values = {
        name: rng.normal(size=size).astype(jnp.bfloat16 if name == "b" else np.float32)
        for name, size in SIZES.items()
    }
    return {
        name: jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, SPECS[name]), lambda index, x=x: x[index]
        )
        for name, x in values.items()
    }


def abstract_params(mesh):
    """Returns the shapes and shardings of `initial_params`."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        initial_params(mesh),
    )


def different_workers(state):
    """Returns the state with another multiple of the parameters for each worker."""

    def scale(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        factors = (1 + jnp.arange(len(leaf)) / 7).astype(leaf.dtype)
        shape = (-1, *(1,) * (leaf.ndim - 1))
        return (leaf + 1) * factors.reshape(shape)

    shardings = jax.tree.map(lambda x: x.sharding, state.workers)
    program = jax.jit(lambda tree: jax.tree.map(scale, tree), out_shardings=shardings)
    step = jax.jit(lambda x: x + 1, out_shardings=state.step.sharding)
    return state._replace(workers=program(state.workers), step=step(state.step))
