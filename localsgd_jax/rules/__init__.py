"""Synchronisation rules, one family per module."""

from localsgd_jax.core.averaging import average
from localsgd_jax.rules.batch_statistics import merge_batch_stats, recompute_batch_stats
from localsgd_jax.rules.combinators import chain, identity, when
from localsgd_jax.rules.compression import cast, quantize, scaled_sign, top_k
from localsgd_jax.rules.decentralized import gossip
from localsgd_jax.rules.delayed import delay, overlap
from localsgd_jax.rules.diagnostics import with_diagnostics
from localsgd_jax.rules.eager import eager_outer
from localsgd_jax.rules.elastic_averaging import elastic_average, interpolate
from localsgd_jax.rules.flattening import flatten
from localsgd_jax.rules.moving_average import ema
from localsgd_jax.rules.norm_clipping import clip_to_median_norm
from localsgd_jax.rules.optimizer_state import floating_only, reset_to_init
from localsgd_jax.rules.outer_optimizer import (
    diloco,
    fedadam,
    fedavgm,
    lookahead,
    outer,
    slowmo,
    snoo,
)
from localsgd_jax.rules.partitioning import desloc, partition
from localsgd_jax.rules.radial_directional import radial_directional_average
from localsgd_jax.rules.robust import drop_outliers, median, trimmed_mean
from localsgd_jax.rules.sharded import shard_state
from localsgd_jax.rules.sparse import chunked_top_k, sparseloco
from localsgd_jax.rules.streaming import fragment
from localsgd_jax.rules.variance_reduction import control_variates

__all__ = [
    "average",
    "cast",
    "chain",
    "chunked_top_k",
    "clip_to_median_norm",
    "control_variates",
    "delay",
    "desloc",
    "diloco",
    "drop_outliers",
    "eager_outer",
    "elastic_average",
    "ema",
    "fedadam",
    "fedavgm",
    "flatten",
    "floating_only",
    "fragment",
    "gossip",
    "identity",
    "interpolate",
    "lookahead",
    "median",
    "merge_batch_stats",
    "outer",
    "overlap",
    "partition",
    "quantize",
    "radial_directional_average",
    "recompute_batch_stats",
    "reset_to_init",
    "scaled_sign",
    "shard_state",
    "slowmo",
    "snoo",
    "sparseloco",
    "top_k",
    "trimmed_mean",
    "when",
    "with_diagnostics",
]
