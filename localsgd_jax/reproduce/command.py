"""The command `localsgd reproduce`: the experiments of the paper."""

from collections.abc import Callable
from pathlib import Path

import click

from localsgd_jax.experiments.one_line import one_line


def _out(context: click.Context, option: click.Parameter, value: Path | None) -> Path:
    """Fills in the directory; quick runs have one of their own."""
    del option
    return value or Path("reproduce-quick" if context.params["quick"] else "reproduce")


def _common(command: Callable) -> Callable:
    """Adds the options that every experiment has."""
    quick = click.option(
        "--quick",
        is_flag=True,
        is_eager=True,
        help="A smaller version, in less than two minutes.",
    )
    out = click.option(
        "--out",
        type=click.Path(path_type=Path, file_okay=False),
        callback=_out,
        help="Directory for all that is written; an experiment begun there with the "
        "same settings goes on.  [default: reproduce, or reproduce-quick]",
    )
    return quick(out(command))


@click.group()
def reproduce() -> None:
    """Repeat an experiment of the paper, or all of them.

    Each writes a table NAME.csv, a figure NAME.png and NAME.svg, and NAME.txt, which
    says what was expected and what was seen.
    """


_DATA = click.option(
    "--data",
    default="w8a",
    show_default=True,
    help="A known data set or a file in LIBSVM format to run on instead.",
)
_RHO = click.option(
    "--rho",
    type=click.FloatRange(min=0),
    default=25.0,
    show_default=True,
    help="Time to exchange a vector over time of a gradient.",
)


@reproduce.command("speedup-theory")
@_common
@_RHO
@click.option(
    "--epsilon",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-6,
    show_default=True,
    help="The positive accuracy of panel (b).",
)
def speedup_theory(quick: bool, out: Path, rho: float, epsilon: float) -> None:
    """The model's speedup S(K) over K and H, without and with an accuracy ε.

    Takes two seconds; --quick changes nothing.
    """
    del quick
    from localsgd_jax.reproduce import speedup_theory as experiment

    with one_line():
        click.echo(experiment.run(out, rho, epsilon), nl=False)


@reproduce.command()
@_common
@click.option(
    "--rho",
    "rhos",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    default=(1.0, 25.0),
    show_default=True,
    help="Price of communication: time to exchange a vector over time of a gradient. "
    "May be given several times, and changed without running anything again.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    help="How many.  [default: 8, or 3 with --quick]",
)
@click.option(
    "--exponents",
    type=(int, int),
    metavar="LOW HIGH",
    help="Step sizes 2^LOW to 2^HIGH, extended where the best lies on the edge.  "
    "[default: -8 1, or -6 1 with --quick]",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Steps after which ε counts as not reached.  [default: 1048576]",
)
@_DATA
def w8a(quick: bool, out: Path, rhos: tuple, data: str, **changes) -> None:
    """Iterations to reach ε on w8a over K, H and b, and the speedup they give.

    The step size is the best of the paper's grid in every cell of the table, the
    output the best of the last iterate and three averages.
    """
    from localsgd_jax.reproduce import w8a as experiment

    with one_line():
        plan = experiment.quick() if quick else experiment.full()
        plan = experiment.changed(plan, **changes)
        click.echo(experiment.run(out, plan, data, rhos), nl=False)


@reproduce.command()
@_common
def rounds(quick: bool, out: Path) -> None:
    """How the period H may grow with T: as the square root of T/K, not faster."""
    from localsgd_jax.reproduce import rounds as experiment

    with one_line():
        plan = experiment.quick() if quick else experiment.full()
        click.echo(experiment.run(out, plan), nl=False)


@reproduce.command()
@_common
def linear(quick: bool, out: Path) -> None:
    """Linear speedup: error × K at fixed T, and the K where it ends."""
    from localsgd_jax.reproduce import linear as experiment

    with one_line():
        plan = experiment.quick() if quick else experiment.full()
        click.echo(experiment.run(out, plan), nl=False)


@reproduce.command("async")
@_common
@_DATA
def stragglers(quick: bool, out: Path, data: str) -> None:
    """Time to ε on w8a with slow workers, without and with waiting for them."""
    from localsgd_jax.reproduce import stragglers as experiment

    with one_line():
        plan = experiment.quick() if quick else experiment.full()
        click.echo(experiment.run(out, plan, data), nl=False)


@reproduce.command("all")
@_common
@click.pass_context
def everything(context: click.Context, quick: bool, out: Path) -> None:
    """Run all experiments, with --quick each in its smaller version."""
    for name, command in reproduce.commands.items():
        if command is not everything:
            click.echo(f"{name} …", err=True)
            context.invoke(command, quick=quick, out=out)
