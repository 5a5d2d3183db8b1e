"""The `localsgd doctor` command."""

import json

import click

# Marks of the results, in the order of `environment.checks`.
MARKS = {"ok": "ok     ", "info": "info   ", "warning": "WARNING", "failed": "FAILED "}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def doctor(as_json: bool) -> None:
    """Check this installation: versions, devices, threads, extras, two processes.

    Warns if collectives of emulated CPU devices can starve. Starts two processes on
    this machine that connect over the loopback interface and average two workers.
    Exits with 1 if a check has failed.

    \b
    Examples:
      localsgd doctor
      JAX_NUM_CPU_DEVICES=8 localsgd doctor
    """
    from localsgd_jax.reporting import environment

    found = []
    for check in environment.checks():
        found.append(check)
        if not as_json:
            click.echo(f"{MARKS[check.status]}  {check.name}: {check.text}")
    if as_json:
        click.echo(json.dumps([check._asdict() for check in found], indent=2))
    if any(check.status == environment.FAILED for check in found):
        raise SystemExit(1)
