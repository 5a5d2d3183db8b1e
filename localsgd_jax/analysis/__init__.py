"""Communication analysis: collectives of compiled programs and bytes sent."""

from localsgd_jax.analysis.assertions import (
    UnexpectedCollectiveError,
    assert_no_collectives,
)
from localsgd_jax.analysis.collective_op import (
    Branch,
    CollectiveOp,
    Loop,
    filter_by_axis,
)
from localsgd_jax.analysis.hlo.source_locations import Frame
from localsgd_jax.analysis.jaxpr_bytes import jaxpr_bytes_sent
from localsgd_jax.analysis.ops import collective_ops, parse_collective_ops
from localsgd_jax.analysis.ring_bytes import DCN_BYTES_FACTOR, RING_BYTES_FACTOR
from localsgd_jax.analysis.table import format_table
from localsgd_jax.analysis.total_bytes import total_bytes_sent

__all__ = [
    "DCN_BYTES_FACTOR",
    "RING_BYTES_FACTOR",
    "Branch",
    "CollectiveOp",
    "Frame",
    "Loop",
    "UnexpectedCollectiveError",
    "assert_no_collectives",
    "collective_ops",
    "filter_by_axis",
    "format_table",
    "jaxpr_bytes_sent",
    "parse_collective_ops",
    "total_bytes_sent",
]
