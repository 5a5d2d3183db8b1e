"""The `localsgd` command itself: help, version, missing dependencies."""

import subprocess

import pytest
from harness.command_line import invoke, run_python
from harness.selection import keep


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
        'localsgd needs its command-line extra: pip install "localsgd-jax[cli]"\n'
    )
