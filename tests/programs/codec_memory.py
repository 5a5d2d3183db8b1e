"""Prints bytes of temporary memory per number of each codec, compiled for a target."""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from localsgd_jax.analysis.compile_targets import target_mesh
from localsgd_jax.core.pytrees import join_rows
from localsgd_jax.rules.codecs import (
    BITS,
    float_codec,
    integer_codec,
    pack,
    row_multiple,
    split_tiles,
    unpack,
)
from localsgd_jax.rules.float4_codec import float4_codec

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn)


def exchange(codec, workers):
    """Makes an exchange of the chunks of a vector, encoded by a codec."""

    def run(vector):
        multiple = row_multiple(codec.block_size, vector.size // workers)
        rows = split_tiles(vector, workers, multiple)
        encoded = codec.encode(rows.reshape(workers, -1), jax.random.key(0))
        received = jax.tree.map(
            lambda x: jax.lax.all_to_all(x, "worker", 0, 0), encoded
        )
        return join_rows(codec.decode(received), vector.size)

    return run


def gather_signs(vector):
    """Sums the signs of all workers."""
    padding = -vector.size % row_multiple(8, vector.size)
    packed = pack(jnp.pad(vector >= 0, (0, padding)).astype(jnp.uint8), 1)

    def add(total, message):
        signs = unpack(message, 1)[: vector.size]
        return total + jnp.where(signs, 1.0, -1.0), None

    gathered = jax.lax.all_gather(packed, "worker")
    return jax.lax.scan(add, jnp.zeros_like(vector), gathered)[0]


def temporary_bytes(function, size, mesh):
    """Returns the bytes of temporary memory on a device per number of its vector."""
    worker = PartitionSpec("worker")
    vectors = jax.ShapeDtypeStruct(
        (mesh.size, size), jnp.float32, sharding=NamedSharding(mesh, worker)
    )
    program = jax.shard_map(
        lambda x: function(x[0])[None],
        mesh=mesh,
        in_specs=worker,
        out_specs=worker,
        check_vma=False,
    )
    compiled = jax.jit(program).lower(vectors).compile()
    return compiled.memory_analysis().temp_size_in_bytes / size


def main(target, size):
    mesh = target_mesh(target)
    programs = {"signs": gather_signs}
    for dtype in FLOATS:
        programs[jnp.dtype(dtype).name] = exchange(float_codec(dtype), mesh.size)
    for bits in BITS:
        codec = integer_codec(bits, 256, stochastic=False)
        programs[f"{bits} bits"] = exchange(codec, mesh.size)
    codec = integer_codec(4, 256, stochastic=True)
    programs["4 bits, stochastic"] = exchange(codec, mesh.size)
    programs["E3M0"] = exchange(float4_codec(256, stochastic=False), mesh.size)
    measured = {k: temporary_bytes(f, size, mesh) for k, f in programs.items()}
    print(json.dumps(measured))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
