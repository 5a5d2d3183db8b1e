"""The measurement over slow links: it works, and it leaves nothing behind."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.slow_link import network, results
from benchmarks.slow_link.__main__ import enough
from benchmarks.slow_link.methods import METHODS

ROOT = pathlib.Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "benchmarks.slow_link", "gpt", "--tiny"]
pytestmark = pytest.mark.skipif(
    network.missing() is not None, reason=f"no slow links here: {network.missing()}"
)


def devices():
    return sorted(path.name for path in pathlib.Path("/sys/class/net").iterdir())


def namespaces():
    """Network namespaces that any process is in."""
    found = set()
    for path in pathlib.Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(path))
        except OSError:
            continue  # The process has ended.
    return found


def test_a_slow_link_takes_longer_and_gives_the_same_numbers(tmp_path):
    before = devices()
    done = subprocess.run(
        [*COMMAND, "--mbit", "1000", "1", "--seconds", "1", "--out", str(tmp_path)]
        + ["--methods", "Local SGD, H = 16", "Local SGD, H = 16, beside"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "slow_link.json").read_text())["rows"]
    time_of = {(row["method"], row["mbit"]): row["ms/step"] for row in rows}
    assert len(time_of) == 4
    # A hundred kB at 1 Mbit/s are most of a second, on whatever machine.
    for method in {method for method, _ in time_of}:
        assert time_of[method, 1] > 2 * time_of[method, 1000]
    assert (tmp_path / "slow_link.png").stat().st_size > 10_000
    assert devices() == before


def test_a_killed_measurement_leaves_no_network_behind(tmp_path):
    before = namespaces()
    with subprocess.Popen(
        [*COMMAND, "--out", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as run:
        until = time.monotonic() + 60
        while len(namespaces() - before) < 3 and time.monotonic() < until:
            time.sleep(0.1)
        made = namespaces() - before
        run.send_signal(signal.SIGKILL)
    assert len(made) == 3
    until = time.monotonic() + 20
    while namespaces() & made and time.monotonic() < until:
        time.sleep(0.1)
    assert not namespaces() & made


def test_no_network_is_made_where_others_are():
    with pytest.raises(RuntimeError, match="enter"):
        network.Network(2)


def test_who_is_not_root_is_told(tmp_path):
    script = "from benchmarks.slow_link import network; print(network.missing())"
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    if "Permission denied" in done.stderr:
        pytest.skip("another user cannot read this Python")
    assert done.stdout == "only root may make network namespaces\n", done.stderr


def test_what_is_hidden_is_a_share_of_what_could_be():
    common = {"model": "m", "mbit": 100, "s to target": 1.0, "ms/step alone": 10.0}
    rows = [
        common | {"method": "x", "ms/step": 30.0},
        common | {"method": "x, beside", "ms/step": 22.0},
    ]
    assert results.with_ratios(rows)[1]["hidden"] == pytest.approx(0.8)


def test_rows_that_are_not_measured_again_stay(tmp_path):
    def row(method, mbit, step):
        return {"model": "mlp", "method": method, "mbit": mbit, "ms/step": step}

    before = [row("every step", 10, 1), row("every step", 100, 2), row("other", 10, 3)]
    (tmp_path / "slow_link.json").write_text(json.dumps({"rows": before}))
    now = [row("every step", 10, 4)]
    assert results.others(tmp_path, "rows", now) == before[1:]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("most", [0, 1, 6, 64])
def test_every_piece_is_timed_as_often(name, most):
    method = METHODS[name]
    timed = enough(method, most) - 1  # The first round does not count.
    assert timed % method.pieces == 0 and timed >= (3 if method.beside else 1)
    assert timed < max(most, 1 + 3 * method.pieces)


def test_what_is_hidden_is_told_where_there_is_something_to_hide():
    def row(method, mbit, step):
        one = {"model": "mlp", "method": method, "mbit": mbit, "ms/step": step}
        return one | {"ms/step alone": 10.0, "s to target": None}

    rows = [row("DiLoCo", 100, 18.0), row("DiLoCo, beside", 100, 14.0)]
    rows += [row("DiLoCo", 10, 101.0), row("DiLoCo, beside", 10, 99.0)]
    hidden = [one["hidden"] for one in results.with_ratios(rows)]
    assert hidden == [None, 0.5, None, None]
