"""Arrays of a process that is one of several."""

import jax
import numpy as np


def local_rows(leaf):
    """Returns the pieces of an array in this process, in the order of their indices."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    shards = sorted(leaf.addressable_shards, key=lambda shard: str(shard.index))
    return np.concatenate([np.atleast_1d(shard.data) for shard in shards])
