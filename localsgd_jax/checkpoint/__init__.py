"""Checkpoints of a run, and export of trained parameters."""

from localsgd_jax.checkpoint.export import export_params
from localsgd_jax.checkpoint.run_checkpointer import RunCheckpointer
from localsgd_jax.checkpoint.storage import CheckpointError

__all__ = ["CheckpointError", "RunCheckpointer", "export_params"]
