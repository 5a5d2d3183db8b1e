"""The `localsgd train` command."""

import json
from typing import Any

import click

from localsgd_jax.cli.errors import click_errors
from localsgd_jax.cli.progress import step_progress
from localsgd_jax.experiments.choices import DEFAULT_PERIOD, OPTIMIZERS, SCHEDULES
from localsgd_jax.training.history import NonFiniteLossError


class PositiveFloat32(click.ParamType):
    """Click type for positive numbers that are finite in float32."""

    name = "float"

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> float:
        """Parses a number; unlike `click.FloatRange`, rejects NaN."""
        number = click.FLOAT.convert(value, param, ctx)
        if not 0 < number < 2.0**128:
            self.fail(f"must be positive and finite, got {number:g}", param, ctx)
        return number


_POSITIVE_INT = click.IntRange(min=1)


@click.command()
@click.option(
    "--data",
    required=True,
    help="A file in LIBSVM format, also .gz, .bz2 or .xz; or w8a or a9a, downloaded "
    "once (write ./w8a for a file of that name).",
)
@click.option(
    "--workers",
    default=8,
    show_default=True,
    type=_POSITIVE_INT,
    help="Number of workers K.",
)
@click.option(
    "--period",
    type=_POSITIVE_INT,
    help=f"Local steps between two synchronisations.  [default: {DEFAULT_PERIOD}]",
)
@click.option(
    "--schedule",
    default="every",
    show_default=True,
    help="Synchronisation schedule: " + ", ".join(SCHEDULES) + ".",
)
@click.option(
    "--batch",
    default=4,
    show_default=True,
    type=_POSITIVE_INT,
    help="Examples per worker and step.",
)
@click.option(
    "--steps",
    default=10000,
    show_default=True,
    type=_POSITIVE_INT,
    help="Local steps of each worker.",
)
@click.option(
    "--optimizer",
    default="sgd",
    show_default=True,
    type=click.Choice([*OPTIMIZERS]),
    help="Inner optimizer.",
)
@click.option(
    "--learning-rate",
    type=PositiveFloat32(),
    help="Initial value; decreases linearly to zero.  [default: from the data]",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Seed of the order of the examples.",
)
@click.option(
    "--devices",
    type=_POSITIVE_INT,
    help="Number of devices, each with an equal number of workers.  [default: all "
    "accelerators, or up to 8 CPU devices]",
)
@click.option(
    "--out",
    type=click.Path(),
    help="Output directory, which must not exist.  [default: DATA-DATE-TIME]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def train(as_json: bool, **options) -> None:
    """Train l2-regularised logistic regression on a file.

    Writes a directory with config.json, history.jsonl, params.npz and figure.png.
    The penalty is 1/n; there is no intercept; f* is computed to machine precision.

    \b
    Examples:
      localsgd train --data w8a --workers 16 --period 8 --batch 4
      localsgd train --data my_file.svm.gz --schedule post-local:500 --out run
    """
    from localsgd_jax.experiments.train import (
        TrainOptions,
        format_summary,
        prepare,
        run_prepared,
    )

    with click_errors():
        prepared = prepare(TrainOptions(**options))
    try:
        with (
            click_errors((OSError,)),
            step_progress(prepared.config.steps) as on_step,
        ):
            result = run_prepared(prepared, on_step)
    except NonFiniteLossError as error:
        raise click.ClickException(
            f"the loss is not finite at step {error.step} for the workers "
            f"{error.workers}; the history so far is in {prepared.directory}"
        ) from None
    if result:
        click.echo(json.dumps(result, indent=2) if as_json else format_summary(result))
