"""Indices of the workers of this process."""

import jax
import numpy as np

from localsgd_jax.core.types import Cluster
from localsgd_jax.core.validation import check_type
from localsgd_jax.distributed.arrays import local_rows
from localsgd_jax.execution.process_local import ProcessCluster


def local_workers(cluster: Cluster | ProcessCluster) -> np.ndarray:
    """Returns the indices of the workers of this process.

    The process loads the batches of these workers. A batch has rows for all K workers,
    of which each process transfers its own, or only the rows of these workers, in this
    order.

    Args:
      cluster: `on_mesh(...)` or `simulate(...)`, or the result of `on_processes`; the
        worker indices of its `local` cluster start at 0 in every process.

    Returns:
      Global worker indices in ascending order; all K in a job with a single process.

    Raises:
      TypeError: if the cluster is neither.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.1))
      >>> local_workers(lsgd.simulate(algorithm, workers=3))
      array([0, 1, 2])
    """
    check_type("local_workers(cluster)", "cluster", cluster, Cluster, ProcessCluster)
    if isinstance(cluster, ProcessCluster):
        return np.flatnonzero(np.array(cluster.worker_process) == jax.process_index())
    row = cluster.shard_batch(jax.ShapeDtypeStruct((cluster.num_workers,), np.float32))
    return local_rows(row.sharding, row.shape)
