"""Child process: programs for several TPU slices, compiled by the TPU compiler.

    python slice_collectives.py

Ends with the line "all collectives are right".
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import localsgd_jax as lsgd
from localsgd_jax.analysis import compile_targets, total_bytes_sent
from localsgd_jax.analysis.ring_bytes import DCN_BYTES_FACTOR

ROWS, COLUMNS = 64, 128
SIZE = ROWS * COLUMNS * 4
COLLECTIVES = {
    "all-reduce": lambda axis, n: lambda x: jax.lax.psum(x, axis),
    "all-gather": lambda axis, n: (
        lambda x: jax.lax.all_gather(x, axis, tiled=True)[:ROWS]
    ),
    "reduce-scatter": lambda axis, n: (
        lambda x: jnp.tile(jax.lax.psum_scatter(x, axis, tiled=True), (n, 1))
    ),
    "all-to-all": lambda axis, n: (
        lambda x: jax.lax.all_to_all(x, axis, 0, 0, tiled=True)
    ),
    "collective-permute": lambda axis, n: (
        lambda x: jax.lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])
    ),
}


class Case(NamedTuple):
    """A mesh over slices of 2x2 chips, and an axis along which devices communicate.

    Attributes:
      slices: number of slices.
      sizes: sizes of the mesh axes.
      axis: the axis of the collective.
      slices_of_group: number of slices over which the axis extends.
      order: devices, slice by slice, at each position; None for 0, 1, 2, …
    """

    slices: int
    sizes: dict[str, int]
    axis: str
    slices_of_group: int
    order: tuple[int, ...] | None = None


CASES = [
    Case(2, {"worker": 2, "fsdp": 4}, "worker", 2),
    Case(2, {"worker": 2, "fsdp": 4}, "fsdp", 1),
    Case(2, {"worker": 8}, "worker", 2),
    Case(2, {"worker": 4, "fsdp": 2}, "worker", 2),
    Case(4, {"worker": 4, "fsdp": 4}, "worker", 4),
    Case(4, {"worker": 2, "fsdp": 8}, "fsdp", 2),
    Case(4, {"pod": 2, "worker": 2, "fsdp": 4}, "pod", 2),
    Case(2, {"fsdp": 4, "worker": 2}, "worker", 2, (0, 4, 1, 5, 2, 6, 3, 7)),
    Case(2, {"fsdp": 4, "worker": 2}, "fsdp", 1, (0, 4, 1, 5, 2, 6, 3, 7)),
    Case(2, {"worker": 4, "fsdp": 2}, "worker", 2, (0, 2, 1, 3, 7, 6, 5, 4)),
]


def make_mesh(case: Case) -> Mesh:
    """Returns the mesh of a case."""
    devices = compile_targets.topology_devices(f"tpu:v5e:2x2:slices={case.slices}")
    ordered = np.array(devices)[list(case.order or range(len(devices)))]
    return Mesh(
        ordered.reshape(tuple(case.sizes.values())),
        tuple(case.sizes),
        axis_types=(AxisType.Auto,) * len(case.sizes),
    )


def on_shards(function, mesh: Mesh):
    """Returns a shard_map over all axes, and the shape of its argument."""
    spec = PartitionSpec(tuple(mesh.axis_names))
    call = jax.shard_map(
        function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    shape = (mesh.size * ROWS, COLUMNS)
    sharding = NamedSharding(mesh, spec)
    return call, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def check_collective(case: Case, name: str) -> None:
    """Raises unless axes and bytes on DCN agree with the formulas."""
    mesh = make_mesh(case)
    n = mesh.shape[case.axis]
    call, argument = on_shards(COLLECTIVES[name](case.axis, n), mesh)
    ops = lsgd.collective_ops(call, argument)
    assert ops and all(op.axes == (case.axis,) for op in ops), (case, name, ops)
    expected = DCN_BYTES_FACTOR[name](n, case.slices_of_group) * SIZE
    _, across = total_bytes_sent(ops, case.axis, "dcn")
    assert across == expected, (case, name, across, expected)
    try:
        lsgd.assert_no_collectives(call, argument, axis=case.axis)
    except lsgd.UnexpectedCollectiveError:
        return
    raise AssertionError((case, name))


def loss_fn(params, batch):
    return jnp.mean((batch @ params["w"] @ params["v"]) ** 2)


def training_programs(rule):
    """Returns a cluster of two workers on a slice each, its state and a batch."""
    mesh = make_mesh(CASES[0])
    algorithm = lsgd.local_sgd(loss_fn, optax.sgd(0.1), rule=rule)
    cluster = lsgd.on_mesh(algorithm, mesh)
    sharded = NamedSharding(mesh, PartitionSpec("fsdp"))
    leaf = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=sharded)
    state = cluster.init({"w": leaf, "v": leaf})
    batch = jax.ShapeDtypeStruct((2, 8, 256), jnp.float32)
    return cluster, state, cluster.shard_batch(batch)


def check_diloco() -> None:
    """Raises unless a synchronisation sends a piece of the parameters on DCN."""
    cluster, state, batch = training_programs(lsgd.diloco())
    lsgd.assert_no_collectives(cluster.step, state, batch)
    ops = lsgd.collective_ops(cluster.sync, state)
    piece = 2 * 256 * 256 * 4 // 4
    assert sum(op.bytes for op in ops) == piece, ops
    assert total_bytes_sent(ops, network="dcn") == (piece, piece), ops
    assert all(op.axes == ("worker",) for op in ops), ops


def check_step_with_collective() -> None:
    """Raises unless a mean over the workers is reported with its source line."""
    cluster, state, batch = training_programs(lsgd.average())

    def step(state, batch):
        state, metrics = cluster.step(state, batch)
        return state, jnp.mean(metrics["loss"])  # a collective

    try:
        lsgd.assert_no_collectives(step, state, batch)
    except lsgd.UnexpectedCollectiveError as error:
        (op,) = error.collectives
        line = step.__code__.co_firstlineno + 2
        assert op.dcn_bytes_sent and op.source[1] == line, op
        assert f"slice_collectives.py:{line}" in str(error)
        return
    raise AssertionError("no collective between the slices")


def check_overlap() -> None:
    """Raises unless the transfer is in flight during the loop of local steps."""
    cluster, state, batch = training_programs(lsgd.overlap(lsgd.diloco()))
    batches = jax.ShapeDtypeStruct((4, *batch.shape), batch.dtype)
    ops = lsgd.collective_ops(
        lsgd.fused(cluster), state, cluster.shard_batch(batches, time=True)
    )
    across = [op for op in ops if op.dcn_bytes_sent]
    assert across and all("while" in op.overlapped_ops for op in across), across


def add_one(x):
    """A Pallas kernel that stays on its device."""

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] + 1

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def copy_to_neighbour(x):
    """A Pallas kernel that copies to the next device."""

    def kernel(x_ref, out_ref, *semaphores):
        neighbour = (jax.lax.axis_index("worker") + 1) % 8
        pltpu.make_async_remote_copy(
            x_ref, out_ref, *semaphores, device_id=(neighbour,)
        ).start()

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[anywhere],
        out_specs=anywhere,
        scratch_shapes=[pltpu.SemaphoreType.DMA] * 2,
        compiler_params=pltpu.CompilerParams(has_side_effects=True),
    )(x)


def check_kernels() -> None:
    """Raises unless kernels and callbacks count if they may leave the device."""
    devices = compile_targets.topology_devices("tpu:v5e:2x4")
    mesh = Mesh(np.array(devices), ("worker",), axis_types=(AxisType.Auto,))
    problems = {
        add_one: [],
        copy_to_neighbour: ["Pallas kernel that communicates"],
        lambda x: io_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x): [
            "send to the host",
            "recv from the host",
        ],
        lambda x: x + jnp.sum(jnp.linalg.qr(x)[0]) + jnp.sort(x): [],
    }
    for function, expected in problems.items():
        ops = lsgd.collective_ops(*on_shards(function, mesh))
        assert [op.problem for op in ops] == expected, (function, ops)


if __name__ == "__main__":
    for checked in itertools.product(CASES, COLLECTIVES):
        check_collective(*checked)
    check_diloco()
    check_step_with_collective()
    check_overlap()
    check_kernels()
    print("all collectives are right")
