"""Bytes that a device sends inside a worker, inside a slice and across slices."""

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.pods.topology import Topology, make_mesh
from localsgd_jax.analysis import CollectiveOp, parse_collective_ops


class Traffic(NamedTuple):
    """Bytes that a device sends in one execution, by the ring formulas.

    Loops count with their trip count, and every branch of a conditional counts once.

    Attributes:
      inner_bytes: along axes inside a worker only.
      worker_bytes: along worker axes.
      ici_bytes: inside a slice or host.
      dcn_bytes: across slices or hosts.
    """

    inner_bytes: float
    worker_bytes: float
    ici_bytes: float
    dcn_bytes: float


def read(text: str, described: Topology) -> Traffic:
    """Returns the traffic of a compiled program.

    Args:
      text: the program as HLO text.
      described: the topology for which it was compiled.

    Returns:
      The bytes.
    """
    mesh = make_mesh(described)
    ops = parse_collective_ops(text, dict(mesh.shape))
    slices = [_slice_of(device) for device in mesh.devices.flat]
    workers = set(described.worker_axes)

    def is_across(op: CollectiveOp) -> bool:
        return any(len({slices[i] for i in group}) > 1 for group in op.groups)

    return Traffic(
        _sent(op for op in ops if not workers & set(op.axes or workers)),
        _sent(op for op in ops if workers & set(op.axes or workers)),
        _sent(op for op in ops if not is_across(op)),
        _sent(op for op in ops if is_across(op)),
    )


def _slice_of(device) -> int:
    """Returns the index of the slice of a TPU, or of the host of a GPU."""
    return device.slice_index if device.platform == "tpu" else device.process_index


def _sent(ops: Iterable[CollectiveOp]) -> float:
    return sum(op.bytes_sent * (op.trip_count or 1) for op in ops)


# TEMP until analysis reads megascale transfers
import os
if os.environ.get("TEMP_DCN"):
    import re
    from localsgd_jax.analysis.hlo import parser
    _inner_read = read
    def read(text, described):
        got = _inner_read(text, described)
        prog = parser.parse(text); total = 0.0; from localsgd_jax.analysis.hlo.trip_counts import trip_count
        loops = {}
        for c in prog.computations.values():
            for l in c.values():
                if l.opcode == "while":
                    (b,) = prog.called(l, "body"); loops[id(b)] = trip_count(prog, l, c) or 1
        n = described.slices
        for c in prog.computations.values():
            for l in c.values():
                if l.opcode == "send" and "megascale" in l.attributes:
                    ty = re.search(r'_xla_megascale_transfer_type="(\w+)"', l.attributes)[1]
                    b = parser.type_bytes(c[l.operands[0]].type) * loops.get(id(c), 1)
                    total += b * {"ALL_REDUCE": 2*(n-1)/n, "ALL_GATHER": n-1, "REDUCE_SCATTER": (n-1)/n, "ALL_TO_ALL": (n-1)/n}.get(ty, 1)
        return got._replace(dcn_bytes=got.dcn_bytes+total, worker_bytes=got.worker_bytes+total)
