"""The `localsgd quickstart` command."""

import contextlib
import json
import os
import pty
import subprocess
import termios
import threading

import numpy as np
import pytest
from harness.command_line import PNG, error_of, invoke, run_python


def assert_runs(result, steps):
    runs = result["runs"]
    assert [run["period"] for run in runs] == [1, 4, 16, 64, None]
    rounds = [steps, *(-(-steps // h) for h in (4, 16, 64)), 1]
    assert [run["rounds"] for run in runs] == rounds
    # An all-reduce of 64 float32 over eight workers: 2 · 7/8 · 256 = 448 bytes.
    for run in runs:
        assert run["megabytes"] == pytest.approx(448e-6 * run["rounds"])
        assert 0 < run["suboptimality"] < np.log(2)
        assert run["seconds"] > 0
    assert result["gradients"] == steps * 8 * 4
    assert result["workers"] == result["devices"] == 8


def test_json_output(workdir):
    done = run_python(
        *"-m localsgd_jax quickstart --steps 100 --json".split(), stderr=subprocess.PIPE
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert_runs(result, 100)
    assert (workdir / result["figure"]).read_bytes().startswith(PNG)
    page = (workdir / result["report"]).read_text()
    differs = "<td>1</td><td>4</td><td>16</td><td>64</td><td>one-shot</td>"
    assert f'<tr class="differs"><th>period</th>{differs}</tr>' in page


@pytest.mark.full
def test_table_output(workdir):
    result = invoke("quickstart --steps 20 --figure figure.png")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "period" in line)
    for word in ("period", "rounds", "MB sent/worker", "f - f*", "seconds"):
        assert word in lines[start]
    first = [line.split()[0] for line in lines[start + 1 : start + 6]]
    assert first == ["1", "4", "16", "64", "one-shot"]
    rounds = [line.split()[1] for line in lines[start + 1 : start + 6]]
    assert rounds == ["20", "5", "2", "1", "1"]
    assert (workdir / "figure.png").read_bytes().startswith(PNG)
    assert result.stderr == ""
    assert lines[-3].startswith("next: localsgd train")
    assert lines[-4] == "" and "report: localsgd-quickstart.html" in lines[-5]


def read_chunks(terminal):
    """Yields the output of a terminal until its other end is closed."""
    with contextlib.suppress(OSError):
        while chunk := os.read(terminal, 4096):
            yield chunk


@pytest.mark.full
def test_progress_bar_on_a_terminal():
    parent_end, child_end = pty.openpty()
    termios.tcsetwinsize(child_end, (24, 80))
    shown = []
    reader = threading.Thread(target=lambda: shown.extend(read_chunks(parent_end)))
    reader.start()
    done = run_python(
        *"-m localsgd_jax quickstart --steps 20".split(), stderr=child_end
    )
    os.close(child_end)
    reader.join()
    os.close(parent_end)
    assert done.returncode == 0
    assert b"100%" in b"".join(shown) and b"100/100" in b"".join(shown)


def test_invalid_options_raise():
    assert error_of("quickstart --steps 0", code=2) == (
        "Invalid value for '--steps': 0 is not in the range x>=1."
    )
    assert error_of("quickstart --figure no/f.png") == "--figure: no directory 'no'"
    assert error_of("quickstart --figure .") == "--figure: '.' is a directory"
    assert error_of("quickstart --report no/r.html") == "--report: no directory 'no'"


@pytest.mark.slow
def test_quickstart_error_grows_with_period():
    done = run_python(*"-m localsgd_jax quickstart --json".split())
    result = json.loads(done.stdout)
    assert_runs(result, 2048)
    gaps = [run["suboptimality"] for run in result["runs"]]
    assert gaps == sorted(gaps)
    assert gaps[0] < 1e-3 and gaps[-1] > 1e-2
