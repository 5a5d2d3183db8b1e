"""The `localsgd` command itself: help, version, missing dependencies."""

import inspect
import re
import shlex
import subprocess

import click
import pytest
from click.testing import CliRunner
from harness.command_line import invoke, run_python
from harness.paths import ROOT
from harness.selection import keep

from localsgd_jax.cli.main import cli


def commands(group=cli, path=()):
    """Yields the words and the command of each command, also of subcommands."""
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


COMMANDS = dict(commands())


@pytest.mark.parametrize("path", [*COMMANDS], ids=" ".join)
def test_examples_of_the_help_are_valid(path):
    """All commands but single experiments have examples, which click accepts."""
    text = inspect.cleandoc(COMMANDS[path].help or "")
    found = re.findall(r"^  localsgd (.*)$", text, re.M)
    assert found or path[:1] == ("reproduce",)
    for line in found:
        context, words = click.Context(cli), shlex.split(line.partition("#")[0])
        parent, name = cli, ""
        while isinstance(parent, click.Group):
            name, *words = words
            parent = parent.commands[name]
        parent.make_context(name, words, parent=context)


def test_shell_completion_lists_commands_and_options():
    def complete(words):
        variables = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        variables["_LOCALSGD_COMPLETE"] = "bash_complete"
        done = CliRunner().invoke(cli, [], env=variables, prog_name="localsgd")
        return done.stdout.split()

    assert complete("localsgd re") == ["plain,report", "plain,reproduce"]
    assert complete("localsgd train --op") == ["plain,--optimizer"]
    assert complete("localsgd train --optimizer a") == ["plain,adam", "plain,adamw"]


@pytest.mark.full
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_those_of_the_documentation(shell):
    text = (ROOT / "docs" / "reference" / "cli.md").read_text()
    assert f"_LOCALSGD_COMPLETE={shell}_source localsgd" in text
    variables = {"_LOCALSGD_COMPLETE": f"{shell}_source"}
    done = CliRunner().invoke(cli, [], env=variables, prog_name="localsgd")
    assert done.exit_code == 0 and "_localsgd_completion" in done.stdout


def test_help_and_version():
    assert "quickstart" in invoke("--help").stdout
    assert "--learning-rate" in invoke("train --help").stdout
    assert invoke("--version").stdout.startswith("localsgd, version")


@pytest.mark.parametrize(
    "missing", keep(["click", "sklearn.datasets", "matplotlib"], ["click"])
)
def test_missing_extra_message(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; "
        "sys.argv[1:] = ['quickstart']; "
        "from localsgd_jax.__main__ import main; main()"
    )
    done = run_python("-c", code, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == (
        "Error: localsgd needs its command-line extra: "
        'pip install "localsgd-jax[cli]"\n'
    )
