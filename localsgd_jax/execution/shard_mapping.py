"""Functions of the shards of an array, without communication."""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from localsgd_jax.execution.layout import axis_names


def map_shards(function: Callable, sharding: NamedSharding, out_spec: P) -> Callable:
    """Returns a function of an array that maps each shard on its device.

    Args:
      function: `function(shard, starts) -> result`; `starts` is the index in the array
        of the first element of the shard.
      sharding: sharding of the array.
      out_spec: partition of the results.

    Returns:
      `mapped(array) -> results`, to be called inside of `jax.jit`.
    """
    entries = [axis_names(entry) for entry in sharding.spec]

    def mapped(array: jax.Array) -> jax.Array:
        names = [*entries, *[()] * (array.ndim - len(entries))]
        sizes = sharding.shard_shape(array.shape)
        starts = [
            jax.device_put(
                size * np.arange(_num_shards(sharding, axes), dtype=np.uint32),
                NamedSharding(sharding.mesh, P(axes or None)),
            )
            for axes, size in zip(names, sizes, strict=True)
        ]

        def on_shard(shard: jax.Array, *starts: jax.Array) -> jax.Array:
            return function(shard, [start[0] for start in starts])

        in_specs = (sharding.spec, *(P(axes or None) for axes in names))
        return jax.shard_map(
            on_shard,
            mesh=sharding.mesh,
            in_specs=in_specs,
            out_specs=out_spec,
            check_vma=False,
        )(array, *starts)

    return mapped


def _num_shards(sharding: NamedSharding, axes: tuple) -> int:
    """Returns the number of shards along an axis of an array."""
    return math.prod(sharding.mesh.shape[name] for name in axes)
