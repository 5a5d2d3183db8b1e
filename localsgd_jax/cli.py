"""The commands of `localsgd`, each in the words of its help."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from localsgd_jax.audit.command import audit
from localsgd_jax.distributed import version
from localsgd_jax.experiments.choices import OPTIMIZERS, PERIOD, SCHEDULES
from localsgd_jax.experiments.one_line import one_line
from localsgd_jax.journal import NonFiniteLossError
from localsgd_jax.launch.command import launch
from localsgd_jax.plan.command import plan
from localsgd_jax.reproduce.command import reproduce


def _at_least(least: int) -> Callable:
    """Makes the check of a whole number, in one line."""

    def check(context: click.Context, option: click.Parameter, value: int | None):
        if value is not None and value < least:
            raise click.ClickException(
                f"{option.opts[0]} must be at least {least}, got {value}"
            )
        return value

    return check


def _positive(context: click.Context, option: click.Parameter, value: float | None):
    """Checks a positive number, finite in float32."""
    if value is not None and not 0 < value < 2.0**128:
        raise click.ClickException(
            f"{option.opts[0]} must be positive and finite, got {value:g}"
        )
    return value


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable]:
    """Shows a bar on a terminal; gives the function that moves it by one step."""
    from tqdm import tqdm

    with tqdm(total=total, unit="step", disable=None) as bar:
        yield bar.update


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("localsgd-jax"), prog_name="localsgd")
def cli() -> None:
    """Local SGD: train on many workers that rarely talk."""


@cli.command()
@click.option(
    "--figure",
    default="localsgd-quickstart.png",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where the picture goes.",
)
@click.option(
    "--steps",
    default=2048,
    show_default=True,
    callback=_at_least(1),
    help="Local steps of each worker.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, nothing else.")
def quickstart(figure: Path, steps: int, as_json: bool) -> None:
    """See what the period H costs and saves, in less than a minute.

    Trains l2-regularised logistic regression on handwritten digits, which come with
    scikit-learn, by 8 workers that agree every H = 1, 4, 16, 64 steps or only once at
    the end (one-shot), at an equal number of gradient evaluations.
    """
    from localsgd_jax.experiments.quickstart import PERIODS, check_place, sweep, table

    with one_line():
        check_place(figure)
    with one_line((OSError,)), _progress(steps * len(PERIODS)) as advance:
        result = sweep(figure, steps, advance)
    click.echo(json.dumps(result, indent=2) if as_json else table(result))


@cli.command()
@click.option(
    "--data",
    required=True,
    help="A file in LIBSVM format, also .gz, .bz2 or .xz; or w8a or a9a, downloaded "
    "once (write ./w8a for a file of that name).",
)
@click.option("--workers", default=8, show_default=True, callback=_at_least(1))
@click.option(
    "--period",
    type=int,
    callback=_at_least(1),
    help=f"Local steps between two synchronisations.  [default: {PERIOD}]",
)
@click.option(
    "--schedule",
    default="every",
    show_default=True,
    help="When workers agree: " + ", ".join(SCHEDULES) + ".",
)
@click.option(
    "--batch",
    default=4,
    show_default=True,
    callback=_at_least(1),
    help="Examples for each worker and step.",
)
@click.option(
    "--steps",
    default=10000,
    show_default=True,
    callback=_at_least(1),
    help="Local steps of each worker.",
)
@click.option(
    "--optimizer", default="sgd", show_default=True, type=click.Choice([*OPTIMIZERS])
)
@click.option(
    "--learning-rate",
    type=float,
    callback=_positive,
    help="The first one; it falls to zero linearly.  [default: from the data]",
)
@click.option("--seed", default=0, show_default=True, callback=_at_least(0))
@click.option(
    "--devices",
    type=int,
    callback=_at_least(1),
    help="How many.  [default: the accelerators present, or up to 8 CPU devices]",
)
@click.option(
    "--out",
    type=click.Path(),
    help="Directory to write, which must not exist.  [default: DATA-DATE-TIME]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, nothing else.")
def train(as_json: bool, **options) -> None:
    """Train l2-regularised logistic regression on a file.

    Writes a directory with config.json, history.jsonl, params.npz and figure.png.
    The penalty is 1/n; there is no intercept; f* is computed to machine precision.
    """
    from localsgd_jax.experiments.train import Options, execute, prepare, summary

    with one_line():
        job = prepare(Options(**options))
    try:
        with one_line((OSError,)), _progress(job.plan.steps) as advance:
            result = execute(job, advance)
    except NonFiniteLossError as error:
        raise click.ClickException(
            f"the loss is not finite at step {error.step} for the workers "
            f"{error.workers}; the history so far is in {job.directory}"
        ) from None
    if result:
        click.echo(json.dumps(result, indent=2) if as_json else summary(result))


cli.add_command(audit)
cli.add_command(launch)
cli.add_command(plan)
cli.add_command(reproduce)
