"""The `localsgd report` command."""

from pathlib import Path

import click

from localsgd_jax.cli.errors import click_errors


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--out",
    default="localsgd-report.html",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Path of the page.",
)
def report(paths: tuple[str, ...], out: Path) -> None:
    """Write a page that compares runs, for a browser without a network.

    RUN is a directory of `localsgd train` or of `reporting.to_run_directory`, or a file
    of JSON lines or CSV with a row per round. The page has the loss and all other
    columns against steps, rounds, bytes or seconds, bytes, drift and waiting, and the
    configurations with their differences marked.

    \b
    Examples:
      localsgd report w8a-20250101-120000
      localsgd report runs/h4 runs/h16 --out compare.html
    """
    from localsgd_jax.reporting.page import write_report
    from localsgd_jax.reporting.run_files import read_run

    with click_errors():
        write_report([read_run(path) for path in paths], out)
    click.echo(f"written: {out}")
