"""The `localsgd reproduce` commands: experiments of the paper."""

from collections.abc import Callable
from pathlib import Path

import click

from localsgd_jax.cli.errors import click_errors


def _default_out(
    context: click.Context, option: click.Parameter, value: Path | None
) -> Path:
    """Returns the output directory; quick runs have another default."""
    del option
    return value or Path("reproduce-quick" if context.params["quick"] else "reproduce")


def common_options(command: Callable) -> Callable:
    """Adds the options of all experiments to a command.

    Args:
      command: function of the command.

    Returns:
      The same function with the options --quick and --out.
    """
    quick = click.option(
        "--quick",
        is_flag=True,
        is_eager=True,
        help="Run a smaller version, in less than two minutes.",
    )
    out = click.option(
        "--out",
        type=click.Path(path_type=Path, file_okay=False),
        callback=_default_out,
        help="Output directory; an interrupted experiment with the same settings "
        "resumes.  [default: reproduce, or reproduce-quick]",
    )
    return quick(out(command))


@click.group()
def reproduce() -> None:
    """Repeat one experiment of the paper, or all of them.

    Each experiment NAME writes a table NAME.csv, a figure NAME.png and NAME.svg, and
    NAME.txt with the expected and the observed results.

    \b
    Examples:
      localsgd reproduce linear-speedup --quick
      localsgd reproduce all --out reproduced
    """


_DATA = click.option(
    "--data",
    default="w8a",
    show_default=True,
    help="A registered dataset, or a file in LIBSVM format.",
)
_RHO_HELP = "Communication cost: time to exchange a vector over time of a gradient."


@reproduce.command("speedup-theory", short_help="Evaluate the model of the speedup.")
@common_options
@click.option(
    "--rho",
    type=click.FloatRange(min=0),
    default=25.0,
    show_default=True,
    help=_RHO_HELP,
)
@click.option(
    "--epsilon",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-6,
    show_default=True,
    help="Accuracy ε of panel (b) of the figure.",
)
def speedup_theory(quick: bool, out: Path, rho: float, epsilon: float) -> None:
    """Evaluate the model of the speedup S(K) over K and H, for several accuracies ε.

    Takes two seconds; --quick has no effect.
    """
    del quick
    from localsgd_jax.experiments.paper import speedup_model as experiment

    with click_errors():
        click.echo(experiment.run(out, rho, epsilon), nl=False)


@reproduce.command(short_help="Measure iterations to reach ε on w8a.")
@common_options
@click.option(
    "--rho",
    "rhos",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    default=(1.0, 25.0),
    show_default=True,
    help=_RHO_HELP + " May be given several times. Runs are reused when it changes.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    help="Number of seeds.  [default: 8, or 3 with --quick]",
)
@click.option(
    "--exponents",
    type=(int, int),
    metavar="LOW HIGH",
    help="Step sizes 2^LOW to 2^HIGH, extended where the best lies on the edge.  "
    "[default: -8 1, or -6 1 with --quick]",
)
@click.option(
    "--max-steps",
    type=click.IntRange(min=1),
    help="Steps after which ε counts as not reached.  [default: 1048576]",
)
@_DATA
def w8a(quick: bool, out: Path, rhos: tuple, data: str, **overrides) -> None:
    """Measure iterations to reach ε on w8a over K, H and b, and the speedup.

    The step size is the best of the paper's grid in every cell of the table, the
    output the best of the last iterate and three averages.
    """
    from localsgd_jax.experiments.paper import w8a as experiment

    with click_errors():
        config = experiment.QUICK if quick else experiment.FULL
        config = experiment.with_overrides(config, **overrides)
        click.echo(experiment.run(out, config, data, rhos), nl=False)


@reproduce.command("period-scaling", short_help="Measure how H may grow with T.")
@common_options
def period_scaling(quick: bool, out: Path) -> None:
    """Measure how fast the period H may grow with T: as √(T/K), not faster."""
    from localsgd_jax.experiments.paper import period_scaling as experiment

    with click_errors():
        config = experiment.QUICK if quick else experiment.FULL
        click.echo(experiment.run(out, config), nl=False)


@reproduce.command("linear-speedup", short_help="Measure error × K at fixed T.")
@common_options
def linear_speedup(quick: bool, out: Path) -> None:
    """Measure error × K at fixed T, and the K at which the linear speedup ends."""
    from localsgd_jax.experiments.paper import linear_speedup as experiment

    with click_errors():
        config = experiment.QUICK if quick else experiment.FULL
        click.echo(experiment.run(out, config), nl=False)


@reproduce.command(short_help="Measure the time to ε with slow workers.")
@common_options
@_DATA
def stragglers(quick: bool, out: Path, data: str) -> None:
    """Measure the time to ε on w8a with slow workers, synchronous and asynchronous."""
    from localsgd_jax.experiments.paper import stragglers as experiment

    with click_errors():
        config = experiment.QUICK if quick else experiment.FULL
        click.echo(experiment.run(out, config, data), nl=False)


@reproduce.command("all", short_help="Run all experiments.")
@common_options
@click.pass_context
def run_all(context: click.Context, quick: bool, out: Path) -> None:
    """Run all experiments; with --quick, a smaller version of each."""
    for name, command in reproduce.commands.items():
        if command is not run_all:
            click.echo(f"{name} …", err=True)
            context.invoke(command, quick=quick, out=out)
