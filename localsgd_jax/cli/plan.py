"""The `localsgd plan` command."""

import json
from pathlib import Path

import click

from localsgd_jax.cli.errors import click_errors

_POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command(short_help="Recommend a synchronisation period for a link.")
@click.option(
    "--measure",
    "function_name",
    metavar="MODULE:FUNCTION",
    help="Function to measure. FUNCTION(mesh) returns a cluster, its state and a batch "
    "(arrays); with --steps also the loss of an example and, optionally, examples.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=2),
    default=8,
    show_default=True,
    help="Number of workers K.",
)
@click.option("--step-seconds", type=_POSITIVE, help="Seconds per local step.")
@click.option(
    "--parameters",
    type=click.IntRange(min=1),
    help="Number of synchronised parameters.",
)
@click.option(
    "--bits",
    type=_POSITIVE,
    help="Bits sent per parameter.  [default: 32, or as measured]",
)
@click.option(
    "--fragments",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of fragments, each synchronised once per round.",
)
@click.option(
    "--overlap-steps",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Local steps that overlap with the all-reduce of a fragment.",
)
@click.option(
    "--latency",
    type=click.FloatRange(min=0),
    help="Latency of your link in seconds; needs --bandwidth.",
)
@click.option(
    "--bandwidth",
    type=_POSITIVE,
    help="Bandwidth of your link in bytes per second; needs --latency.",
)
@click.option(
    "--max-communication-fraction",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Largest fraction of the time in exposed communication.",
)
@click.option(
    "--constants",
    type=(float, float, float, float),
    metavar="MU L SIGMA2 G2",
    help="Constants of the problem; measured if not given.",
)
@click.option(
    "--mu",
    type=_POSITIVE,
    help="Known strong convexity, such as the penalty; measured if not given.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Local steps of the run; bounds the period by the theory, with the constants "
    "given or measured.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Examples per worker and step.  [default: 1, or as measured]",
)
@click.option("--figure", type=click.Path(path_type=Path), help="PNG file to write.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def plan(
    figure: Path | None, max_communication_fraction: float, as_json: bool, **options
) -> None:
    """Recommend a synchronisation period for your link and for example links.

    Give --step-seconds and --parameters, or --measure, which times local steps, rounds
    and all-reduces on the local devices. Without accelerators, these are --workers
    emulated CPU devices.

    \b
    Examples:
      localsgd plan --step-seconds 0.2 --parameters 124000000
      localsgd plan --measure my_programs:logistic --workers 4 --steps 1000000
    """
    from localsgd_jax.planning import report
    from localsgd_jax.planning.settings import Settings, resolve

    fraction = max_communication_fraction
    with click_errors():
        settings = Settings(max_communication_fraction=fraction, **options)
        workload, links, bound = resolve(settings)
        max_period = bound.max_period if bound else None
        rows = report.plan_rows(workload, links, fraction, max_period)
        if figure is not None:
            report.plot(workload, rows, figure)
    if as_json:
        result = {
            "workload": workload._asdict(),
            "max_period": max_period,
            "constants": bound
            and bound.constants._asdict() | {"measured": bound.measured},
            "links": rows,
        }
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo(report.format_table(workload, rows, fraction, bound))
