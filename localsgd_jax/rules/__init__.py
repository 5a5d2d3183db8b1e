"""How workers agree, one family of rules per file."""

from localsgd_jax.rules.combine import chain, keep, when
from localsgd_jax.rules.mean import average

__all__ = ["average", "chain", "keep", "when"]
