"""Synchronisations of all rules with sharded workers, lowered for a topology.

Uses only public names that do not change, so that an earlier version of the package can
be measured.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from benchmarks.pods import topology

SGD = optax.sgd(0.7, momentum=0.9, nesterov=True)

# The first is the default.
MESHES = {
    "2-slices": topology.Topology("tpu:v5p:4x4x1", 2, {"worker": 2, "fsdp": 16}),
    "1-slice": topology.Topology("tpu:v5p:4x4x1", 1, {"worker": 2, "fsdp": 8}),
    "2-inner-axes": topology.Topology(
        "tpu:v5p:4x4x1", 2, {"worker": 2, "fsdp": 4, "model": 4}
    ),
    "4-slices": topology.Topology("tpu:v5p:4x4x1", 4, {"worker": 4, "fsdp": 16}),
    "lanes": topology.Topology("tpu:v5p:4x4x1", 2, {"worker": 2, "fsdp": 16}, lanes=2),
    "levels": topology.Topology(
        "tpu:v5p:4x4x1", 2, {"pod": 2, "worker": 2, "fsdp": 8}, ("pod", "worker")
    ),
    "h100": topology.Topology("gpu:h100:2x8", 1, {"worker": 2, "fsdp": 8}),
}


def _compressed(compress, *args) -> lsgd.SyncRule:
    """Returns DiLoCo with a compressed mean."""
    return lsgd.outer(SGD, compress(lsgd.average(), *args))


def _streaming(rule: lsgd.SyncRule) -> lsgd.SyncRule:
    """Returns the rule on four fragments, each applied a few steps later."""
    return lsgd.fragment(
        lsgd.interpolate(lsgd.delay(rule), 0.5), 4, rounds_per_fragment=2
    )


# Rules by the call that makes them; K is the number of workers.
RULES = {
    "average()": lambda k: lsgd.average(),
    "diloco()": lambda k: lsgd.diloco(),
    "slowmo()": lambda k: lsgd.slowmo(),
    "fedadam()": lambda k: lsgd.fedadam(),
    "lookahead()": lambda k: lsgd.lookahead(),
    "elastic_average()": lambda k: lsgd.elastic_average(0.5 / k, 0.5),
    "interpolate(diloco(), 0.5)": lambda k: lsgd.interpolate(lsgd.diloco(), 0.5),
    "gossip(ring)": lambda k: lsgd.gossip("ring"),
    "gossip(exponential)": lambda k: lsgd.gossip("exponential"),
    "overlap(diloco())": lambda k: lsgd.overlap(lsgd.diloco()),
    "delay(diloco())": lambda k: lsgd.delay(lsgd.diloco()),
    "ema(diloco())": lambda k: lsgd.ema(lsgd.diloco()),
    "fragment(diloco(), 4)": lambda k: lsgd.fragment(lsgd.diloco(), 4),
    "fragment(diloco(), 4, split_axis=0)": lambda k: lsgd.fragment(
        lsgd.diloco(), 4, split_axis=0
    ),
    "fragment(diloco(), 4, split_axis=1)": lambda k: lsgd.fragment(
        lsgd.diloco(), 4, split_axis=1
    ),
    "streaming": lambda k: _streaming(lsgd.diloco()),
    "streaming, 4 bits": lambda k: _streaming(_compressed(lsgd.quantize, 4)),
    "shard_state(diloco(), K)": lambda k: lsgd.shard_state(lsgd.diloco(), k),
    "flatten(average())": lambda k: lsgd.flatten(lsgd.average()),
    "with_diagnostics(diloco())": lambda k: lsgd.with_diagnostics(lsgd.diloco()),
    "drop_outliers(diloco())": lambda k: lsgd.drop_outliers(lsgd.diloco()),
    "drop_outliers(4 bits)": lambda k: lsgd.drop_outliers(
        _compressed(lsgd.quantize, 4)
    ),
    "median()": lambda k: lsgd.median(),
    "trimmed_mean(0.25)": lambda k: lsgd.trimmed_mean(0.25),
    "cast, bfloat16": lambda k: _compressed(lsgd.cast),
    "cast, float8": lambda k: _compressed(lsgd.cast, jnp.float8_e4m3fn),
    "quantize, 4 bits": lambda k: _compressed(lsgd.quantize, 4),
    "quantize, 1 bit": lambda k: _compressed(lsgd.quantize, 1),
    "quantize, E3M0": lambda k: lsgd.outer(
        SGD, lsgd.quantize(lsgd.average(), 4, encoding="e3m0")
    ),
    "top_k, 1 %": lambda k: _compressed(lsgd.top_k, 0.01),
    "scaled_sign": lambda k: _compressed(lsgd.scaled_sign),
    "sparseloco()": lambda k: lsgd.sparseloco(),
    "clip_to_median_norm": lambda k: _compressed(lsgd.clip_to_median_norm),
    "clip_to_median_norm, 4 bits": lambda k: lsgd.outer(
        SGD, lsgd.clip_to_median_norm(lsgd.quantize(lsgd.average(), 4))
    ),
    "radial_directional_average": lambda k: _compressed(
        lsgd.radial_directional_average
    ),
    "eager_outer": lambda k: lsgd.eager_outer(SGD),
    "snoo()": lambda k: lsgd.snoo(),
    "control_variates": lambda k: lsgd.control_variates(0.1, 100),
    "partition": lambda k: lsgd.partition(
        {"mean": lsgd.average(), "outer": lsgd.diloco()},
        lambda path: "mean" if "embedding" in path else "outer",
    ),
    "desloc(diloco())": lambda k: lsgd.desloc(lsgd.diloco()),
    "moments every 8 rounds": lambda k: {
        "params": lsgd.diloco(),
        "opt_state": lsgd.when(lsgd.every(8), lsgd.floating_only(lsgd.average())),
    },
    "moments every round": lambda k: {
        "params": lsgd.diloco(),
        "opt_state": lsgd.floating_only(lsgd.average()),
    },
    "reset_to_init() of moments": lambda k: {
        "params": lsgd.diloco(),
        "opt_state": lsgd.reset_to_init(),
    },
    "merge_batch_stats()": lambda k: {
        "params": lsgd.average(),
        "batch_stats": lsgd.merge_batch_stats(),
    },
    "levels, average()": lambda k: lsgd.chain(
        lsgd.average("worker"),
        lsgd.when(lsgd.every(8), lsgd.outer(optax.sgd(0.7), "pod")),
    ),
    "levels, diloco()": lambda k: lsgd.chain(
        lsgd.average("worker"), lsgd.when(lsgd.every(8), lsgd.outer(SGD, "pod"))
    ),
}
SHAPES = {"large": (24, 2048, 32000), "small": (8, 1024, 8192), "tiny": (2, 256, 512)}


def parameter_shapes(size: str, mesh: Mesh) -> dict:
    """Returns the parameters of a GPT, sharded inside a worker, without values."""
    layers, width, vocabulary = SHAPES[size]
    model = "model" if "model" in mesh.shape else None

    def leaf(shape, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    return {
        "embedding": leaf((vocabulary, width), model, "fsdp"),
        "blocks": {
            "scale": leaf((layers, width)),
            "qkv": leaf((layers, width, 3 * width), None, "fsdp", model),
            "out": leaf((layers, width, width), None, model, "fsdp"),
            "up": leaf((layers, width, 4 * width), None, "fsdp", model),
            "down": leaf((layers, 4 * width, width), None, model, "fsdp"),
        },
    }


def lower_sync(mesh: str, rule: str, size: str, weighted: bool = False):
    """Lowers the synchronisation of a rule; returns it and the sizes of its state."""
    described = MESHES[mesh]
    devices = topology.make_mesh(described)
    params = parameter_shapes(size, devices)
    algorithm, start = _algorithm(rule, described.num_workers, params, size, devices)
    axes = described.worker_axes
    cluster = lsgd.on_mesh(
        algorithm, devices, described.num_workers, axis=axes if axes[1:] else axes[0]
    )
    state = cluster.init(start)
    weights = jax.ShapeDtypeStruct((described.num_workers,), jnp.float32)
    lowered = jax.jit(cluster.sync, donate_argnums=0).lower(
        state, *([weights] if weighted else [])
    )
    return lowered, {
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        "piece_bytes": _bytes(params) / described.devices_per_worker,
        "least_bytes": _bytes((state.workers, state.local)) / devices.size
        + _bytes(state.shared) / described.devices_per_worker,
    }


def _algorithm(rule: str, workers: int, params, size: str, mesh):
    """Returns the algorithm of a rule and the values that it starts from."""
    made = RULES[rule](workers)
    if rule == "merge_batch_stats()":
        layers, width, _ = SHAPES[size]
        leaf = jax.ShapeDtypeStruct(
            (layers, width), jnp.float32, sharding=NamedSharding(mesh, P())
        )
        start = {"params": params, "batch_stats": {"n": {"mean": leaf, "var": leaf}}}
        return lsgd.from_train_step(lambda state, batch: (state, {}), made), start
    moments = isinstance(made, dict)
    optimizer = optax.adamw(1e-4) if moments else optax.sgd(0.1)
    return lsgd.local_sgd(_loss, optimizer, rule=made), params


def _loss(params, batch):
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)) * jnp.sum(batch)


def _bytes(tree) -> int:
    """Returns the bytes of all arrays of a tree."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
