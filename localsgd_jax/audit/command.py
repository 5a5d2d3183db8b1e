"""The command `localsgd audit`."""

import json
import re
import sys

import click

from localsgd_jax.experiments.one_line import one_line


def _axes(
    context: click.Context, option: click.Parameter, value: str | None
) -> dict[str, int] | None:
    """Reads the axes of a mesh, such as `worker=4,model=2`."""
    if value is None:
        return None
    pairs = re.findall(r"(\w+)=([1-9]\d*)(?:,|$)", value)
    if ",".join(f"{name}={size}" for name, size in pairs) != value:
        raise click.ClickException(
            f"--mesh must look like worker=4,model=2, got {value!r}"
        )
    return {name: int(size) for name, size in pairs}


@click.command()
@click.argument("name", metavar="MODULE:FUNCTION")
@click.option(
    "--axis", default="worker", show_default=True, help="Mesh axis between workers."
)
@click.option(
    "--as",
    "kind",
    type=click.Choice(["step", "gated", "round"]),
    default="step",
    show_default=True,
    help="A step must be silent, a gated step may talk in its conditional, a round "
    "outside of its loops.",
)
@click.option(
    "--target",
    help="Devices that need not be here: tpu:v5e:2x4, gpu:h100:8, gpu:h100:2x8. Needs "
    "the extra audit-tpu or audit-gpu.  [default: the devices present; 8 on a CPU]",
)
@click.option(
    "--mesh",
    "axes",
    callback=_axes,
    help="Names and sizes of the axes, such as worker=4,model=2.  [default: worker]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, nothing else.")
def audit(
    name: str,
    axis: str,
    kind: str,
    target: str | None,
    axes: dict[str, int] | None,
    as_json: bool,
) -> None:
    """Show all that a compiled program sends, and fail if a local step talks.

    FUNCTION takes a mesh and returns the function to audit and its arguments, which
    may be shapes. It is compiled and not run.

    Exits with 1 if something talks along the axis that should not.
    """
    from localsgd_jax.audit import inspection, targets

    with one_line():
        build = inspection.load(name)
        report = inspection.inspect(build, targets.mesh(target, axes), axis, kind)
    if as_json:
        click.echo(json.dumps(inspection.as_json(report), indent=2))
    else:
        click.echo(inspection.summary(report))
    sys.exit(bool(report.noisy))
