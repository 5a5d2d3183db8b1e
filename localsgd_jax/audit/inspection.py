"""Compiles what the user names, and judges where it talks."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from localsgd_jax.ledger import Entry, along, ledger, sent, table

# What may talk along the audited axis.
ALLOWED: Mapping[str, Callable[[Entry], bool]] = {
    "step": lambda entry: False,
    "gated": lambda entry: entry.conditional,
    "round": lambda entry: entry.conditional or not entry.looped,
}


class Report(NamedTuple):
    """What an audit found.

    Attributes:
      entries: all collectives of the program.
      noisy: those that should not be there.
      axis: along which it was audited.
      kind: as what: "step", "gated" or "round".
      devices: how many, and of which kind.
    """

    entries: tuple[Entry, ...]
    noisy: tuple[Entry, ...]
    axis: str
    kind: str
    devices: str


def load(name: str) -> Callable:
    """Imports a function by its name `module:function`.

    Args:
      name: of both; the working directory is searched too.

    Returns:
      The function.

    Raises:
      ValueError: if there is no such function.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"audit: a name like module:function is needed, got {name!r}")
    sys.path.insert(0, "")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "") not in (module, module.partition(".")[0]):
            raise
        raise ValueError(f"audit {name}: there is no module {error.name!r}") from None
    finally:
        sys.path.remove("")
    if not callable(getattr(found, function, None)):
        raise ValueError(f"audit {name}: {module} has no function {function!r}")
    return getattr(found, function)


def inspect(build: Callable, mesh: Mesh, axis: str, kind: str) -> Report:
    """Compiles a program for a mesh and looks for what should not talk.

    Args:
      build: `build(mesh) -> (function, *arguments)`; arguments may be shapes.
      mesh: of devices that need not be present.
      axis: mesh axis along which it must be silent.
      kind: as what: a "step" says nothing, a "gated" step only in a conditional, a
        "round" only outside of its loops.

    Returns:
      The report.

    Raises:
      ValueError: if the mesh has no such axis or a single place along it, or the
        arguments are arrays where there are no devices to hold them.
      TypeError: if `build` returns something else.
    """
    if mesh.shape.get(axis, 1) < 2:
        raise ValueError(
            f"--axis {axis}: the mesh {dict(mesh.shape)} has no two places along it"
        )
    try:
        made = build(mesh)
    except jax.errors.JaxRuntimeError as error:
        if "compile-only" not in str(error):
            raise
        raise ValueError(
            "audit: a target holds no arrays; make the state from shapes: "
            "cluster.init(jax.eval_shape(lambda: params)), cluster.put of shapes"
        ) from None
    if not (isinstance(made, Sequence) and made and callable(made[0])):
        raise TypeError(
            f"audit: the function must return (function, *arguments), got {made!r}"
        )
    function, *arguments = made
    entries = ledger(function, *arguments, mesh=mesh)
    noisy = (entry for entry in along(entries, axis) if not ALLOWED[kind](entry))
    first = mesh.devices.flat[0]
    return Report(
        entries, tuple(noisy), axis, kind, f"{mesh.size} x {first.device_kind}"
    )


def summary(report: Report) -> str:
    """Writes a report as a table and a verdict.

    Args:
      report: to write.

    Returns:
      The lines.
    """
    least, most = sent(report.entries, report.axis)
    amount = f"{least:.0f}" if least == most else f"{least:.0f} to {most:.0f}"
    name = {"step": "local step", "gated": "gated step", "round": "round"}[report.kind]
    verdict = (
        f"NOISY: {len(report.noisy)} of {len(report.entries)} collectives talk along "
        f"{report.axis} where a {name} must not:\n"
        + "\n".join(f"  {entry.name} from {entry.source}" for entry in report.noisy)
        if report.noisy
        else f"silent: nothing talks along {report.axis} where a {name} must not"
    )
    return "\n".join(
        [
            f"compiled for {report.devices}",
            *([table(report.entries)] if report.entries else ["no collectives"]),
            f"each device sends {amount} bytes along {report.axis}",
            verdict,
        ]
    )


def as_json(report: Report) -> dict[str, Any]:
    """Writes a report as data.

    Args:
      report: to write.

    Returns:
      Dicts and lists.
    """
    return {
        "devices": report.devices,
        "axis": report.axis,
        "as": report.kind,
        "silent": not report.noisy,
        "collectives": [
            {
                "name": entry.name,
                "dtypes": entry.dtypes,
                "bytes": entry.bytes,
                "sent": entry.sent,
                "axes": entry.axes,
                "path": [place._asdict() for place in entry.path],
                "beside": entry.beside,
                "source": entry.source and str(entry.source),
                "noisy": entry in report.noisy,
            }
            for entry in report.entries
        ],
    }
