"""Command-line interface of `localsgd`."""

import click

from localsgd_jax.cli.audit import audit
from localsgd_jax.cli.doctor import doctor
from localsgd_jax.cli.launch import launch
from localsgd_jax.cli.plan import plan
from localsgd_jax.cli.quickstart import quickstart
from localsgd_jax.cli.report import report
from localsgd_jax.cli.reproduce import reproduce
from localsgd_jax.cli.train import train
from localsgd_jax.distributed.environment import package_version


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_version("localsgd-jax"), prog_name="localsgd")
def cli() -> None:
    """Local SGD: data-parallel training with infrequent synchronisation.

    \b
    Examples:
      localsgd quickstart
      localsgd train --data w8a --workers 16 --period 8 --out run
      localsgd report run
    """


for _command in (quickstart, train, report, audit, plan, launch, reproduce, doctor):
    cli.add_command(_command)
