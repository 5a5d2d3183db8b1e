"""How workers agree, one family of rules per file."""

from localsgd_jax.rules.combine import chain, keep, when
from localsgd_jax.rules.mean import average
from localsgd_jax.rules.moments import floats, reset
from localsgd_jax.rules.statistics import batch_statistics, reestimate

__all__ = [
    "average",
    "batch_statistics",
    "chain",
    "floats",
    "keep",
    "reestimate",
    "reset",
    "when",
]
