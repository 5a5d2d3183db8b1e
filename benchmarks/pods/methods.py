"""Training methods for pods, and the programs to compile for them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from benchmarks.pods import gpt
from benchmarks.pods.topology import Topology, make_mesh

SGD = optax.sgd(0.7, momentum=0.9, nesterov=True)
DATA_PARALLEL, LOCAL_STEP = "data parallel", "local step"


class Method(NamedTuple):
    """A method that synchronises once per period.

    Attributes:
      rule: makes the synchronisation rule.
      fragments: fragments of the parameters, each synchronised once per period.
      rounds_per_cycle: rounds until every fragment has been synchronised.
      overlap_steps: local steps between the start and the end of a synchronisation.
    """

    rule: Callable[[], lsgd.SyncRule]
    fragments: int = 1
    rounds_per_cycle: int = 1
    overlap_steps: int = 0


def _streaming() -> lsgd.SyncRule:
    fragment = lsgd.interpolate(lsgd.delay(lsgd.diloco()), 0.5)
    return lsgd.fragment(fragment, 4, rounds_per_fragment=2)


METHODS = {
    "Local SGD": Method(lambda: lsgd.average()),
    "DiLoCo": Method(lambda: lsgd.diloco()),
    "DiLoCo, 4 bits": Method(lambda: lsgd.outer(SGD, lsgd.quantize(lsgd.average(), 4))),
    "streaming DiLoCo": Method(_streaming, 4, 8, 5),
}


def lower(program: str, topology: dict, shape: dict) -> tuple[jax.stages.Lowered, dict]:
    """Lowers a program for one topology.

    Args:
      program: "data parallel" or "local step" for a step, or the name of a method for
        its synchronisation.
      topology: fields of the `Topology`.
      shape: fields of the `gpt.Shape`.

    Returns:
      The lowered program, and no further facts.
    """
    described, model = Topology(**topology), gpt.Shape(**shape)
    mesh = make_mesh(described)
    if program == DATA_PARALLEL:
        return _lower_data_parallel(model, mesh), {}
    method = METHODS.get(program, METHODS["Local SGD"])
    loss = gpt.make_loss(model, mesh, ["fsdp"])
    algorithm = lsgd.local_sgd(loss, gpt.optimizer(), rule=method.rule())
    cluster = lsgd.on_mesh(algorithm, mesh, batch_spec=P("fsdp"))
    state = cluster.init(gpt.parameter_shapes(model, mesh))
    if program in METHODS:
        return jax.jit(cluster.sync, donate_argnums=0).lower(state), {}
    rows = model.sequences * described.devices_per_worker
    tokens = (cluster.num_workers, rows, model.length + 1)
    batch = cluster.shard_batch(jax.ShapeDtypeStruct(tokens, jnp.int32))
    return jax.jit(cluster.step, donate_argnums=0).lower(state, batch), {}


def _lower_data_parallel(model: gpt.Shape, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers a step of one model on all slices, with FSDP inside a slice."""
    axes = tuple(mesh.axis_names)
    loss, optimizer = gpt.make_loss(model, mesh, axes), gpt.optimizer()
    params = gpt.parameter_shapes(model, mesh)

    def step(params, opt_state, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    shapes = jax.eval_shape(optimizer.init, params)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda moment, param: jax.ShapeDtypeStruct(
            moment.shape, moment.dtype, sharding=param.sharding
        ),
        shapes,
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P())
        ),
    )
    tokens = jax.ShapeDtypeStruct(
        (model.sequences * mesh.size, model.length + 1),
        jnp.int32,
        sharding=NamedSharding(mesh, P(axes)),
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, opt_state))
    jitted = jax.jit(
        step,
        donate_argnums=(0, 1),
        out_shardings=(*shardings, NamedSharding(mesh, P())),
    )
    return jitted.lower(params, opt_state, tokens)
