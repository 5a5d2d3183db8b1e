"""Batches for K workers: shuffling, partitioning and prefetching."""

from localsgd_jax.data.batching import shuffled_batches
from localsgd_jax.data.partitioning import dirichlet_partition, partitioned_batches
from localsgd_jax.data.splitting import split_batch

__all__ = [
    "dirichlet_partition",
    "partitioned_batches",
    "shuffled_batches",
    "split_batch",
]
