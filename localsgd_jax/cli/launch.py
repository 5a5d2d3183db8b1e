"""Command `localsgd launch`: starts the processes of a job on this machine."""

import os
import sys

import click

from localsgd_jax.distributed.launcher import job
from localsgd_jax.distributed.launcher.output import log

MAX_GRACE_SECONDS = 1e6


def _check_grace_period(
    context: click.Context, option: click.Parameter, value: float
) -> float:
    """Returns a grace period; raises if it is negative, NaN or too long."""
    if not 0 <= value <= MAX_GRACE_SECONDS:
        raise click.ClickException(
            f"--grace-period must be from 0 to {MAX_GRACE_SECONDS:g} seconds, got "
            f"{value:g}"
        )
    return value


class ProcessRange(click.ParamType):
    """Click type for a process count N or a range MIN:MAX."""

    name = "N or MIN:MAX"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Returns the smallest and the largest number of processes."""
        low, colon, high = value.partition(":")
        high = high if colon else low
        if not (low.isdecimal() and high.isdecimal() and 0 < int(low) <= int(high)):
            self.fail(f"must be N or MIN:MAX, at least 1, got {value!r}", param, ctx)
        return int(low), int(high)


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "-n",
    "--processes",
    required=True,
    type=ProcessRange(),
    help="Number of processes. With MIN:MAX, MAX processes start; a slot that is the "
    "first to fail in two consecutive starts is excluded while MIN remain.",
)
@click.option(
    "--devices-per-process",
    "devices",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="CPU devices of each process, or accelerators: process p gets the p-th slot.",
)
@click.option(
    "--elastic",
    is_flag=True,
    help="Continue when a process other than process 0 fails.",
)
@click.option(
    "--restarts",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Number of times that all processes are restarted after the job has failed.",
)
@click.option(
    "--grace-period",
    default=30.0,
    show_default=True,
    type=float,
    callback=_check_grace_period,
    help="Seconds from SIGTERM to SIGKILL, and from the abort of another process to "
    "SIGKILL of a process 0 that does not respond (--elastic).",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def launch(
    processes: tuple[int, int],
    devices: int,
    elastic: bool,
    restarts: int,
    grace_period: float,
    command: tuple[str, ...],
) -> None:
    """Run a program in several processes on this machine.

    The program begins with localsgd_jax.initialize(), which connects the processes.
    Each line of output gets the process number as a prefix. SIGINT, SIGTERM and SIGHUP
    are forwarded, the second one as SIGKILL, unless they are ignored when the launcher
    starts (nohup). When a process fails, the others are terminated; none is left
    behind, however the launcher ends. With --elastic, the others are terminated after
    process 0 has exited with 0: SIGTERM after --grace-period seconds, SIGKILL after as
    many again.

    Exits with the code of the first process that failed (with --elastic, that of
    process 0), 128 + n if it was killed by signal n, and 0 without a failure.

    \b
    Examples:
      localsgd launch -n 4 -- python train.py --period 16
      localsgd launch -n 2:4 --elastic --restarts 3 -- python train.py
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        raise click.ClickException("launch: the standard output is closed")
    min_processes, num_processes = processes
    config = job.LaunchConfig(
        command, num_processes, min_processes, devices, elastic, restarts, grace_period
    )
    try:
        code = job.launch(config)
    except OSError as error:
        log(f"cannot start {command[0]!r}: {error.strerror}")
        code = 127 if isinstance(error, FileNotFoundError) else 126
    sys.exit(code)
