"""Audit of user programs: collectives that violate the policy of a program kind."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from localsgd_jax.analysis.entry_point import describe_result
from localsgd_jax.analysis.ops import CollectiveOp, collective_ops, filter_by_axis
from localsgd_jax.analysis.table import format_table
from localsgd_jax.analysis.total_bytes import total_bytes_sent

# Whether a program kind may contain a collective along the audited axis.
ALLOWED_COLLECTIVES: Mapping[str, Callable[[CollectiveOp], bool]] = {
    "step": lambda op: False,
    "gated": lambda op: op.in_branch,
    "round": lambda op: op.in_branch or not op.in_loop,
}
_KIND_NAMES = {"step": "local step", "gated": "gated step", "round": "round"}


class Report(NamedTuple):
    """Result of an audit.

    Attributes:
      collectives: all collectives of the program.
      violations: collectives that the kind does not allow.
      axis: the audited mesh axis.
      kind: "step", "gated" or "round".
      devices: number and kind of the devices.
    """

    collectives: tuple[CollectiveOp, ...]
    violations: tuple[CollectiveOp, ...]
    axis: str
    kind: str
    devices: str


def audit_program(build: Callable, mesh: Mesh, axis: str, kind: str) -> Report:
    """Compiles a program for a mesh and checks its collectives.

    Args:
      build: `build(mesh) -> (function, *arguments)`. The arguments may be
        `jax.ShapeDtypeStruct`.
      mesh: mesh of local devices or of a compile target.
      axis: the audited mesh axis.
      kind: where collectives along the axis are allowed: nowhere in a "step", in a
        conditional of a "gated" step, outside the loops of a "round".

    Returns:
      The report.

    Raises:
      ValueError: if the mesh has no such axis or the axis has size 1, or if `build`
        makes arrays for a compile target.
      TypeError: if `build` returns something else.
    """
    if mesh.shape.get(axis, 1) < 2:
        raise ValueError(
            f"--axis {axis}: an axis of size at least 2 is needed, got the mesh "
            f"{dict(mesh.shape)}"
        )
    try:
        program = build(mesh)
    except jax.errors.JaxRuntimeError as error:
        if "compile-only" not in str(error):
            raise
        raise ValueError(
            "audit: compile targets cannot hold arrays; pass jax.ShapeDtypeStruct: "
            "cluster.init(jax.eval_shape(lambda: params)), cluster.shard_batch(shapes)"
        ) from None
    if not (isinstance(program, Sequence) and program and callable(program[0])):
        raise TypeError(
            "audit: the function must return (function, *arguments), got "
            f"{describe_result(program)}"
        )
    function, *arguments = program
    ops = collective_ops(function, *arguments, mesh=mesh)
    is_allowed = ALLOWED_COLLECTIVES[kind]
    violations = tuple(op for op in filter_by_axis(ops, axis) if not is_allowed(op))
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    return Report(ops, violations, axis, kind, devices)


def format_report(report: Report) -> str:
    """Formats a report as a table of collectives and a result line.

    Args:
      report: the report.

    Returns:
      The lines.
    """
    min_bytes, max_bytes = total_bytes_sent(report.collectives, report.axis)
    amount = f"{min_bytes:.0f}"
    if max_bytes != min_bytes:
        amount += f" to {max_bytes:.0f}"
    return "\n".join(
        [
            f"compiled for {report.devices}",
            format_table(report.collectives)
            if report.collectives
            else "no collectives",
            f"each device sends {amount} bytes along {report.axis!r}",
            _format_result(report),
        ]
    )


def report_to_dict(report: Report) -> dict[str, Any]:
    """Converts a report to JSON-compatible data.

    Args:
      report: the report.

    Returns:
      Nested dicts and lists.
    """
    return {
        "devices": report.devices,
        "axis": report.axis,
        "kind": report.kind,
        "ok": not report.violations,
        "collectives": [
            {
                "name": op.name,
                "dtypes": op.dtypes,
                "bytes": op.bytes,
                "bytes_sent": op.bytes_sent,
                "axes": op.axes,
                "control_flow": [scope._asdict() for scope in op.control_flow],
                "overlapped_ops": op.overlapped_ops,
                "source": op.source and str(op.source),
                "violation": op in report.violations,
            }
            for op in report.collectives
        ],
    }


def _format_result(report: Report) -> str:
    """Formats the result, with the source of each violation."""
    kind, along = _KIND_NAMES[report.kind], f"along {report.axis!r}"
    if not report.violations:
        return f"OK: all collectives {along} are allowed in a {kind}"
    counts = f"{len(report.violations)} of {len(report.collectives)}"
    sources = [f"  {op.name} from {op.source}" for op in report.violations]
    return "\n".join(
        [f"FAILED: {counts} collectives {along} are not allowed in a {kind}:", *sources]
    )
