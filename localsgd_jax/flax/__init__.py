"""Adapters for Flax: linen train states and NNX models."""

from localsgd_jax.flax.linen import from_linen
from localsgd_jax.flax.nnx import NnxTrainState, from_nnx, update_nnx
from localsgd_jax.flax.nnx_metrics import NnxMetrics

__all__ = ["NnxMetrics", "NnxTrainState", "from_linen", "from_nnx", "update_nnx"]
