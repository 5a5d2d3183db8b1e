"""Runs of the command line, in this process or in another one."""

import json
import os
import pathlib
import subprocess
import sys

from click.testing import CliRunner
from harness.paths import ROOT

from localsgd_jax.cli.main import cli

PNG = b"\x89PNG\r\n\x1a\n"
QUICK = "--workers 8 --steps 40 --period 4"


def invoke(line):
    """Runs a command in this process; returns click's result."""
    return CliRunner().invoke(cli, line.split())


def run_train(data, options="", out="run"):
    """Runs `train` for 40 steps; returns its configuration and history."""
    result = invoke(f"train --data {data} --out {out} {QUICK} {options}")
    assert result.exit_code == 0, result.output
    return read_run(out)


def read_run(out):
    """Returns the configuration and the rows of the history of a run directory."""
    out = pathlib.Path(out)
    lines = (out / "history.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return json.loads((out / "config.json").read_text()), rows


def run_python(*arguments, **options):
    """Runs Python in another process with the package on its path."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        **options,
    )


def error_of(line, code=1):
    """Returns the error message of a command, which must write no file.

    With exit code 1 it is the only line; with 2, usage lines precede it.
    """
    before = sorted(pathlib.Path().rglob("*"))
    result = invoke(line)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert sorted(pathlib.Path().rglob("*")) == before
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ")
    assert code == 2 or len(lines) == 1
    return lines[-1].removeprefix("Error: ")
