"""The `localsgd quickstart` command."""

import json
from pathlib import Path

import click

from localsgd_jax.cli.errors import click_errors
from localsgd_jax.cli.progress import step_progress


@click.command()
@click.option(
    "--figure",
    default="localsgd-quickstart.png",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Path of the figure.",
)
@click.option(
    "--report",
    "page",
    default="localsgd-quickstart.html",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Path of the page that compares the runs.",
)
@click.option(
    "--steps",
    default=2048,
    show_default=True,
    type=click.IntRange(min=1),
    help="Local steps of each worker.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def quickstart(figure: Path, page: Path, steps: int, as_json: bool) -> None:
    """Measure the effect of the period H, in less than a minute.

    Trains l2-regularised logistic regression on handwritten digits, which are part of
    scikit-learn, with 8 workers that synchronise every H = 1, 4, 16, 64 steps or only
    once at the end (one-shot), at an equal number of gradient evaluations.

    \b
    Examples:
      localsgd quickstart
      localsgd quickstart --steps 256 --figure figure.png --report page.html
    """
    from localsgd_jax.experiments.quickstart import (
        PERIODS,
        check_writable,
        format_table,
        sweep,
    )

    with click_errors():
        check_writable("--figure", figure)
        check_writable("--report", page)
    with click_errors((OSError,)), step_progress(steps * len(PERIODS)) as on_step:
        result = sweep(figure, page, steps, on_step)
    click.echo(json.dumps(result, indent=2) if as_json else format_table(result))
