"""How workers agree, one family of rules per file."""

from localsgd_jax.rules.combine import chain, keep, when
from localsgd_jax.rules.compress import cast, quantize, signs, topk
from localsgd_jax.rules.delay import delay, overlap
from localsgd_jax.rules.elastic import elastic, mix
from localsgd_jax.rules.flatten import flatten
from localsgd_jax.rules.fragment import fragment
from localsgd_jax.rules.gossip import gossip
from localsgd_jax.rules.mean import average
from localsgd_jax.rules.outer import (
    diloco,
    fedadam,
    fedavgm,
    lookahead,
    outer,
    shard,
    slowmo,
)
from localsgd_jax.rules.robust import guard, median, trimmed_mean

__all__ = [
    "average",
    "cast",
    "chain",
    "delay",
    "diloco",
    "elastic",
    "fedadam",
    "fedavgm",
    "flatten",
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
    "shard",
    "signs",
    "slowmo",
    "topk",
    "trimmed_mean",
    "when",
]
