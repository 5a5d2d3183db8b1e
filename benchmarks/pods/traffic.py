"""Bytes that a device sends inside a worker, inside a slice and across slices."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.pods.topology import Topology, make_mesh
from localsgd_jax.analysis import CollectiveOp, parse_collective_ops


class Traffic(NamedTuple):
    """Bytes that a device sends in one execution, by the ring formulas.

    Loops count with their trip count, and every branch of a conditional counts once.
    None stands for a number that an instruction hides which is not understood.

    Attributes:
      inner_bytes: along axes inside a worker only.
      worker_bytes: along worker axes.
      ici_bytes: inside a slice or host.
      dcn_bytes: across slices or hosts.
    """

    inner_bytes: float | None
    worker_bytes: float | None
    ici_bytes: float | None
    dcn_bytes: float | None


def read(text: str, described: Topology) -> Traffic:
    """Returns the traffic of a compiled program.

    Args:
      text: the program as HLO text.
      described: the topology for which it was compiled.

    Returns:
      The bytes.
    """
    mesh = make_mesh(described)
    ops = parse_collective_ops(text, mesh)
    workers = set(described.worker_axes)

    def total(numbers: Iterable[tuple[CollectiveOp, float]]) -> float | None:
        sent = sum(count * (op.trip_count or 1) for op, count in numbers)
        return sent if math.isfinite(sent) else None

    inner = [op for op in ops if not workers & set(op.axes or workers)]
    between = [op for op in ops if workers & set(op.axes or workers)]
    return Traffic(
        total((op, op.bytes_sent) for op in inner),
        total((op, op.bytes_sent) for op in between),
        total((op, op.ici_bytes_sent) for op in ops),
        total((op, op.dcn_bytes_sent) for op in ops),
    )
