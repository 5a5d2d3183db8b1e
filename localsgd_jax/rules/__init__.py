"""How workers agree, one family of rules per file."""

from localsgd_jax.rules.combine import chain, keep, when
from localsgd_jax.rules.compression import cast, quantize, signs, topk
from localsgd_jax.rules.elastic_averaging import elastic, mix
from localsgd_jax.rules.mean import average
from localsgd_jax.rules.moments import floats, reset
from localsgd_jax.rules.neighbours import gossip
from localsgd_jax.rules.outer_optimizer import (
    diloco,
    fedadam,
    fedavgm,
    lookahead,
    outer,
    shard,
    slowmo,
)
from localsgd_jax.rules.overlapping import delay, overlap
from localsgd_jax.rules.robust import guard, median, trimmed_mean
from localsgd_jax.rules.smoothing import ema
from localsgd_jax.rules.statistics import batch_statistics, reestimate
from localsgd_jax.rules.streaming import fragment
from localsgd_jax.rules.vectors import flatten

__all__ = [
    "average",
    "batch_statistics",
    "cast",
    "chain",
    "delay",
    "diloco",
    "elastic",
    "ema",
    "fedadam",
    "fedavgm",
    "flatten",
    "floats",
    "fragment",
    "gossip",
    "guard",
    "keep",
    "lookahead",
    "median",
    "mix",
    "outer",
    "overlap",
    "quantize",
    "reestimate",
    "reset",
    "shard",
    "signs",
    "slowmo",
    "topk",
    "trimmed_mean",
    "when",
]
