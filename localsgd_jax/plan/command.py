"""The command `localsgd plan`."""

import json
from pathlib import Path

import click

from localsgd_jax.experiments.one_line import one_line

_POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command()
@click.option(
    "--measure",
    "name",
    metavar="MODULE:FUNCTION",
    help="Times what FUNCTION returns for a mesh: a cluster, its state and a batch; "
    "with --steps also the loss of an example, and examples if not those of the batch.",
)
@click.option("--workers", type=click.IntRange(min=2), default=8, show_default=True)
@click.option("--compute", type=_POSITIVE, help="Seconds for a local step.")
@click.option(
    "--parameters", type=click.IntRange(min=1), help="Numbers that workers agree on."
)
@click.option(
    "--bits", type=_POSITIVE, help="For each on the wire.  [default: 32, or the rule's]"
)
@click.option(
    "--fragments",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Pieces, each exchanged once a round.",
)
@click.option(
    "--overlap",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Local steps during which a piece may travel.",
)
@click.option("--latency", type=click.FloatRange(min=0), help="Of your link, seconds.")
@click.option("--bandwidth", type=_POSITIVE, help="Of your link, bytes per second.")
@click.option(
    "--share",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Of the time that workers may wait.",
)
@click.option(
    "--constants",
    type=(float, float, float, float),
    metavar="MU L SIGMA2 G2",
    help="Of the problem, in place of measured ones.",
)
@click.option(
    "--mu", type=_POSITIVE, help="If known, such as the penalty; else measured."
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Local steps of the run: caps the period by constants given or measured.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Examples of a worker's step.  [default: 1, or as measured]",
)
@click.option("--figure", type=click.Path(path_type=Path), help="Picture to draw.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, nothing else.")
def plan(figure: Path | None, share: float, as_json: bool, **options) -> None:
    """Which period pays: time per step for a link of yours and for common ones.

    Give --compute and --parameters, or --measure, which times a local step and
    all-reduces on the devices that are here: those of a machine without accelerators
    are --workers emulated ones.
    """
    from localsgd_jax.plan import report
    from localsgd_jax.plan.settings import Settings, settle

    with one_line():
        job, links, cap = settle(Settings(share=share, **options))
        found = report.rows(job, links, share, cap.longest if cap else None)
        if figure is not None:
            report.draw(job, found, figure)
    if as_json:
        result = {
            "job": job._asdict(),
            "longest": cap and cap.longest,
            "constants": cap and cap.constants._asdict() | {"measured": cap.measured},
            "links": found,
        }
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo(report.table(job, found, share, cap))
