"""Command-line interface of `localsgd`."""

import click

from localsgd_jax.cli.audit import audit
from localsgd_jax.cli.launch import launch
from localsgd_jax.cli.plan import plan
from localsgd_jax.cli.quickstart import quickstart
from localsgd_jax.cli.reproduce import reproduce
from localsgd_jax.cli.train import train
from localsgd_jax.distributed.environment import package_version


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_version("localsgd-jax"), prog_name="localsgd")
def cli() -> None:
    """Local SGD: data-parallel training with infrequent synchronisation."""


for _command in (quickstart, train, audit, plan, launch, reproduce):
    cli.add_command(_command)
