"""Checks of `localsgd doctor`."""

import json
import subprocess

import pytest
from harness.command_line import invoke, run_python

from localsgd_jax.reporting import environment


@pytest.mark.parametrize(
    "devices, cpus, nproc, status, text",
    [
        (8, 2, "", "warning", "set NPROC=16 before Python starts"),
        (8, 2, "16", "ok", "16 threads (NPROC=16)"),
        (8, 8, "", "ok", "8 threads (processors)"),
        (1, 1, "", "ok", "1 threads"),
        (4, 2, "none", "warning", "2 threads"),
    ],
)
def test_starvation_threatens_with_more_devices_than_threads(
    devices, cpus, nproc, status, text
):
    check = environment.check_threads(devices, cpus, nproc)
    assert check.status == status and text in check.text


def test_missing_extras_are_named_with_the_command(monkeypatch):
    extras = {"first": ("json", "not_a_module"), "second": ("os.path",)}
    monkeypatch.setattr(environment, "EXTRAS", extras)
    first, second = environment.check_extras()
    assert first.status == "info"
    assert first.text == 'without not_a_module: pip install "localsgd-jax[first]"'
    assert second.status == "ok"


def test_command_exits_with_1_after_a_failed_check(monkeypatch):
    found = [environment.Check("a", "ok", "x"), environment.Check("b", "failed", "y")]
    monkeypatch.setattr(environment, "checks", lambda: iter(found))
    done = invoke("doctor")
    assert done.stdout == "ok       a: x\nFAILED   b: y\n" and done.exit_code == 1
    done = invoke("doctor --json")
    assert json.loads(done.stdout)[1] == {"name": "b", "status": "failed", "text": "y"}


@pytest.mark.full
def test_a_process_that_fails_is_reported(monkeypatch):
    program = "import os\nassert os.environ['LOCALSGD_PROCESS_ID'] == '0', 'broken'\n"
    result = f"print({environment._RESULT!r})"
    monkeypatch.setattr(environment, "_PROGRAM", program + result)
    check = environment.check_two_processes()
    assert check.status == "failed"
    assert check.text == "process 1: AssertionError: broken"


@pytest.mark.full
def test_processes_that_do_not_end_are_terminated(monkeypatch):
    monkeypatch.setattr(environment, "_PROGRAM", "import time\ntime.sleep(600)")
    check = environment.check_two_processes(timeout=1)
    assert check.status == "failed" and "not connected within 1 s" in check.text


@pytest.mark.full
def test_doctor_connects_two_processes():
    done = run_python("-m", "localsgd_jax", "doctor", "--json", stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["two processes"]["status"] == "ok"
    assert "jax" in checks["versions"]["text"] and "cpu" in checks["devices"]["text"]
