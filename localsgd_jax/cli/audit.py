"""The `localsgd audit` command."""

import json
import re
import sys

import click

from localsgd_jax.cli.errors import click_errors


class _MeshAxes(click.ParamType):
    """Click type for mesh axes such as `worker=4,model=2`."""

    name = "axes"

    def convert(
        self,
        value: str | dict[str, int],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> dict[str, int]:
        """Parses names and sizes."""
        if isinstance(value, dict):
            return value
        pairs = re.findall(r"(\w+)=([1-9]\d*)(?:,|$)", value)
        if ",".join(f"{name}={size}" for name, size in pairs) != value:
            raise click.ClickException(
                f"--mesh must look like worker=4,model=2, got {value!r}"
            )
        return {name: int(size) for name, size in pairs}


@click.command(short_help="Report the collectives of a compiled program.")
@click.argument("name", metavar="MODULE:FUNCTION")
@click.option(
    "--axis", default="worker", show_default=True, help="Mesh axis between workers."
)
@click.option(
    "--kind",
    type=click.Choice(["step", "gated", "round"]),
    default="step",
    show_default=True,
    help="Where collectives along the axis are allowed: nowhere in a step, in the "
    "conditional of a gated step, outside the loops of a round.",
)
@click.option(
    "--target",
    help="Devices to compile for, which need not be present: tpu:v5e:2x4, two slices "
    "tpu:v5e:4x4:slices=2, gpu:h100:8, two hosts gpu:h100:2x8. Needs the extra "
    "audit-tpu or audit-gpu.  [default: the local devices; 8 emulated devices on a "
    "CPU]",
)
@click.option(
    "--mesh",
    "axes",
    type=_MeshAxes(),
    help="Names and sizes of the mesh axes, such as worker=4,model=2.  [default: one "
    "axis 'worker' of all devices]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def audit(
    name: str,
    axis: str,
    kind: str,
    target: str | None,
    axes: dict[str, int] | None,
    as_json: bool,
) -> None:
    """Report the collectives of a compiled program; fail if a local step has any.

    FUNCTION takes a mesh and returns the function to audit and its arguments, which
    may be jax.ShapeDtypeStruct. The function is compiled and not run.

    Bytes inside TPU slices or hosts (ICI) and across them (DCN) are given apart.

    Exits with 1 if the program contains collectives along the axis that its kind does
    not allow, or instructions that may leave a device and are not understood.

    \b
    Examples:
      localsgd audit my_programs:local_step --mesh worker=4,model=2
      localsgd audit my_programs:gated --kind gated --target tpu:v5e:2x4
    """
    from localsgd_jax.analysis import compile_targets, entry_point, program_audit

    with click_errors():
        build = entry_point.import_function(name)
        mesh = compile_targets.target_mesh(target, axes)
        report = program_audit.audit_program(build, mesh, axis, kind)
    if as_json:
        click.echo(json.dumps(program_audit.report_to_dict(report), indent=2))
    else:
        click.echo(program_audit.format_report(report))
    sys.exit(bool(report.violations))
