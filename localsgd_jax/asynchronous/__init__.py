"""Asynchronous Local SGD: workers update a shared aggregate without barriers.

`simulate_events` and `simulate` run it deterministically on a virtual clock;
`on_threads` runs it on the devices of a host.
"""

from localsgd_jax.asynchronous.aggregation import (
    Aggregation,
    UpdateContext,
    constant_weighting,
    mean_update,
    polynomial_weighting,
    server_optimizer,
)
from localsgd_jax.asynchronous.events import (
    EventKind,
    EventTrace,
    max_staleness,
    random_speeds,
    simulate_events,
)
from localsgd_jax.asynchronous.nesterov import DelayedNesterov, delayed_nesterov
from localsgd_jax.asynchronous.simulation import simulate
from localsgd_jax.asynchronous.staleness import (
    align_to_momentum,
    aligned_nesterov,
    cosine_gated_weighting,
)
from localsgd_jax.asynchronous.state import AsyncCluster, AsyncState
from localsgd_jax.asynchronous.threads import on_threads, throughput
from localsgd_jax.asynchronous.trajectory import SnapshotState, with_snapshots

__all__ = [
    "Aggregation",
    "AsyncCluster",
    "AsyncState",
    "DelayedNesterov",
    "EventKind",
    "EventTrace",
    "SnapshotState",
    "UpdateContext",
    "align_to_momentum",
    "aligned_nesterov",
    "constant_weighting",
    "cosine_gated_weighting",
    "delayed_nesterov",
    "max_staleness",
    "mean_update",
    "on_threads",
    "polynomial_weighting",
    "random_speeds",
    "server_optimizer",
    "simulate",
    "simulate_events",
    "throughput",
    "with_snapshots",
]
