"""Prints the ops of steps that communicate in unusual ways, for two TPU slices.

Each line has the name of a case, whether `assert_no_collectives` refuses the step on
the axis "worker", and the bytes that a device sends across slices.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import localsgd_jax as lsgd
from localsgd_jax.analysis import compile_targets, parse_collective_ops

AXES = ("worker", "fsdp")


def make_meshes():
    """Returns meshes by name: where the workers are on the two slices."""
    devices = np.array(compile_targets.topology_devices("tpu:v5e:2x2:slices=2"))
    grids = {
        "one worker per slice": devices.reshape(2, 4),
        "two workers per slice": devices.reshape(4, 2),
        "worker across slices": devices.reshape(2, 4).T,
        "devices in any order": np.random.default_rng(0).permutation(devices)[:, None],
    }
    types = (AxisType.Auto,) * 2
    return {name: Mesh(grid, AXES, axis_types=types) for name, grid in grids.items()}


def all_reduce(x):
    return jax.lax.psum(x, "worker")


def all_reduce_inside(x):
    return jax.lax.psum(x, "fsdp")


def permute(*pairs):
    return lambda x: jax.lax.ppermute(x, "worker", pairs)


def all_to_all(x):
    size = jax.lax.axis_size("worker")
    return jax.lax.all_to_all(x.reshape(size, -1), "worker", 0, 0).reshape(-1)


def gather_everything(x):
    return jax.lax.all_gather(x, AXES).sum(0)


def nested_loops(x):
    """Communicates in a loop of unknown length around another loop."""

    def outer(carry):
        count, x = carry
        return count + 1, jax.lax.fori_loop(0, 3, lambda i, x: all_reduce(x) / 2, x)

    return jax.lax.while_loop(lambda carry: carry[0] < carry[1][0], outer, (0.0, x))[1]


def branch_of_scan(x):
    def body(x, i):
        swap = permute((0, 1), (1, 0))
        return jax.lax.cond(i == 3, swap, lambda x: x, x), None

    return jax.lax.scan(body, x, jnp.arange(5))[0]


def debug_print(x):
    jax.debug.print("{}", x[0])
    return x


def pure_callback(x):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def sort(x):
    return jnp.sort(x) + jax.lax.axis_index("worker")


CASES = [
    ("all-reduce", "one worker per slice", all_reduce),
    ("all-reduce", "two workers per slice", all_reduce),
    ("all-reduce", "worker across slices", all_reduce),
    ("all-reduce", "devices in any order", all_reduce),
    ("all-reduce inside", "one worker per slice", all_reduce_inside),
    ("all-reduce inside", "worker across slices", all_reduce_inside),
    ("permutation across, one way", "one worker per slice", permute((0, 1))),
    ("permutation in slice 1 only", "two workers per slice", permute((2, 3))),
    ("permutation from slice 0", "two workers per slice", permute((1, 2))),
    ("all-to-all", "two workers per slice", all_to_all),
    ("gather along both axes", "one worker per slice", gather_everything),
    ("nested loops", "one worker per slice", nested_loops),
    ("branch of a scan", "one worker per slice", branch_of_scan),
    ("debug print", "one worker per slice", debug_print),
    ("pure callback", "one worker per slice", pure_callback),
    ("sort", "two workers per slice", sort),
]


def raises_error(compiled, mesh):
    try:
        lsgd.assert_no_collectives(compiled, axis="worker", mesh=mesh)
    except lsgd.UnexpectedCollectiveError:
        return True
    return False


def main():
    meshes = make_meshes()
    for case, name, step in CASES:
        mesh, spec = meshes[name], PartitionSpec(AXES)
        sharded = jax.shard_map(
            step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
        shape = jax.ShapeDtypeStruct(
            (8 * 1024,), jnp.float32, sharding=NamedSharding(mesh, spec)
        )
        compiled = jax.jit(sharded).lower(shape).compile()
        ops = parse_collective_ops(compiled.as_text(), mesh)
        sent = sum(op.dcn_bytes_sent for op in ops)
        row = {"case": f"{case}, {name}", "raises": raises_error(compiled, mesh)}
        print(json.dumps(row | {"dcn_bytes": str(sent)}), flush=True)


if __name__ == "__main__":
    main()
