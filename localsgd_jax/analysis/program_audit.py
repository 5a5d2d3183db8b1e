"""Audit of user programs: collectives that violate the policy of a program kind."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
from jax.sharding import Mesh

from localsgd_jax.analysis import compilation
from localsgd_jax.analysis.collective_op import CollectiveOp, filter_by_axis
from localsgd_jax.analysis.device_layout import DeviceLayout, make_layout
from localsgd_jax.analysis.entry_point import describe_result
from localsgd_jax.analysis.ops import parse_collective_ops
from localsgd_jax.analysis.table import describe_op, format_table
from localsgd_jax.analysis.total_bytes import total_bytes_sent

# Whether a program kind may contain a collective along the audited axis. None may
# contain an op that is not understood.
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
      devices: number and kind of the devices, and number of slices or hosts.
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
      ValueError: if the mesh has no such axis or the axis has size 1, if `build`
        makes arrays for a compile target, or if the program does not run on the whole
        mesh.
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
    text = compilation.compile_program(
        "audit", function, tuple(arguments), {}
    ).as_text()
    compilation.check_devices("audit", text, mesh)
    ops, is_allowed = parse_collective_ops(text, mesh), ALLOWED_COLLECTIVES[kind]
    violations = tuple(
        op for op in filter_by_axis(ops, axis) if op.problem or not is_allowed(op)
    )
    return Report(ops, violations, axis, kind, _describe_devices(mesh))


def format_report(report: Report) -> str:
    """Formats a report as a table of collectives and a result line.

    Args:
      report: the report.

    Returns:
      The lines.
    """
    total, ici, dcn = (
        _format_range(total_bytes_sent(report.collectives, report.axis, network))
        for network in (None, "ici", "dcn")
    )
    return "\n".join(
        [
            f"compiled for {report.devices}",
            format_table(report.collectives)
            if report.collectives
            else "no collectives",
            f"each device sends {total} bytes along {report.axis!r}: {ici} on ICI, "
            f"{dcn} on DCN",
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
        "ici_bytes_sent": _finite_range(report, "ici"),
        "dcn_bytes_sent": _finite_range(report, "dcn"),
        "collectives": [
            {
                "name": op.name,
                "problem": op.problem or None,
                "dtypes": op.dtypes,
                "bytes": op.bytes,
                "bytes_sent": _finite(op.bytes_sent),
                "ici_bytes_sent": _finite(op.ici_bytes_sent),
                "dcn_bytes_sent": _finite(op.dcn_bytes_sent),
                "axes": op.axes,
                "control_flow": [scope._asdict() for scope in op.control_flow],
                "overlapped_ops": op.overlapped_ops,
                "source": op.source and str(op.source),
                "violation": op in report.violations,
            }
            for op in report.collectives
        ],
    }


def _describe_devices(mesh: Mesh) -> str:
    """Returns the number and kind of the devices, and how many slices or hosts."""
    first = mesh.devices.flat[0]
    count = cast(DeviceLayout, make_layout(mesh)).num_slices
    devices = f"{mesh.size} x {first.device_kind}"
    unit = "slices" if first.platform == "tpu" else "hosts"
    return f"{devices} in {count} {unit}" if count > 1 else devices


def _format_range(bytes_range: tuple[float, float]) -> str:
    """Formats a minimum and a maximum; "?" for an unknown one."""
    low, high = ("?" if math.isinf(x) else f"{x:.0f}" for x in bytes_range)
    return low if low == high else f"{low} to {high}"


def _finite_range(report: Report, network: str) -> list[float | None]:
    """Returns the bytes along the audited axis as JSON; None if they are unknown."""
    totals = total_bytes_sent(report.collectives, report.axis, network)
    return [_finite(total) for total in totals]


def _finite(number: float) -> float | None:
    """Returns None for infinity, which JSON cannot express."""
    return None if math.isinf(number) else number


def _format_result(report: Report) -> str:
    """Formats the result, with the source of each violation."""
    kind, along = _KIND_NAMES[report.kind], f"along {report.axis!r}"
    if not report.violations:
        return f"OK: all collectives {along} are allowed in a {kind}"
    counts = f"{len(report.violations)} of {len(report.collectives)}"
    sources = [
        f"  {describe_op(op)} from {op.source or 'an unknown source'}"
        for op in report.violations
    ]
    return "\n".join(
        [f"FAILED: {counts} collectives {along} are not allowed in a {kind}:", *sources]
    )
