"""The command `localsgd launch`."""

import os
import sys

import click

from localsgd_jax.launch import job
from localsgd_jax.launch.output import say

LONGEST = 1e6


def _seconds(context: click.Context, option: click.Parameter, value: float) -> float:
    """Checks a time that a computer can wait."""
    if not 0 <= value <= LONGEST:
        raise click.ClickException(
            f"--grace must be from 0 to {LONGEST:g} seconds, got {value:g}"
        )
    return value


class Counts(click.ParamType):
    """How many processes: N, or MIN:MAX."""

    name = "N or MIN:MAX"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Returns the least and the most."""
        low, colon, high = value.partition(":")
        high = high if colon else low
        if not (low.isdecimal() and high.isdecimal() and 0 < int(low) <= int(high)):
            self.fail(f"it must be N or MIN:MAX, at least 1, got {value!r}", param, ctx)
        return int(low), int(high)


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "-n",
    "--processes",
    required=True,
    type=Counts(),
    help="How many processes to start. Of MIN:MAX all MAX start; one that fails first "
    "in two starts in a row is left out of later ones, while MIN are left.",
)
@click.option(
    "--devices-per-process",
    "devices",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="CPU devices of each process, or accelerators: process p gets the p-th lot.",
)
@click.option(
    "--elastic",
    is_flag=True,
    help="Let the others go on when a process fails that is not process 0.",
)
@click.option(
    "--restarts",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="How often to start all processes again when the job has failed.",
)
@click.option(
    "--grace",
    default=30.0,
    show_default=True,
    type=float,
    callback=_seconds,
    help="Seconds from asking processes to end until they are killed.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def launch(
    processes: tuple[int, int],
    devices: int,
    elastic: bool,
    restarts: int,
    grace: float,
    command: tuple[str, ...],
) -> None:
    """Run a program in several processes on this machine.

    Example: localsgd launch -n 4 -- python train.py --period 16

    The program begins with localsgd_jax.initialize(), by which its processes find each
    other. Their lines come with the number of the process in front. SIGINT, SIGTERM
    and SIGHUP are passed on, at the second time as SIGKILL, unless the launcher was
    started to ignore them (nohup). When a process fails the others are ended; none is
    left behind, however the launcher ends. With --elastic the others end when process
    0 has ended with 0: asked after --grace seconds, killed after as many again.

    Exits with the code of the first process that failed (with --elastic that of
    process 0), 128 + n if signal n ended it, and with 0 if none did.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        raise click.ClickException("launch: the standard output is closed")
    least, most = processes
    settings = job.Settings(command, most, least, devices, elastic, restarts, grace)
    try:
        code = job.launch(settings)
    except OSError as error:
        say(f"cannot start {command[0]!r}: {error.strerror}")
        code = 127 if isinstance(error, FileNotFoundError) else 126
    sys.exit(code)
