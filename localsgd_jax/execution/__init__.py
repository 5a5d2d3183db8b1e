"""Execution of workers on one device, on a mesh or per process."""

from localsgd_jax.execution.mean_model import consensus
from localsgd_jax.execution.placement import on_mesh, simulate
from localsgd_jax.execution.process_local import (
    ProcessCluster,
    merge_late_sync,
    on_processes,
)
from localsgd_jax.execution.rounds import fused, gated

__all__ = [
    "ProcessCluster",
    "consensus",
    "fused",
    "gated",
    "merge_late_sync",
    "on_mesh",
    "on_processes",
    "simulate",
]
