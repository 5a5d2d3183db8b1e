"""Checkpoints of a run, and export of trained parameters."""

from localsgd_jax.checkpoint.errors import CheckpointError
from localsgd_jax.checkpoint.export import export_params
from localsgd_jax.checkpoint.run_checkpointer import RunCheckpointer

__all__ = ["CheckpointError", "RunCheckpointer", "export_params"]
