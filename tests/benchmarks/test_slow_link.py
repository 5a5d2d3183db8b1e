"""Tests of the measurement over slow links, and of the removal of its network."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from harness.paths import ROOT
from harness.selection import keep

from benchmarks.slow_link import network, results, tasks, worker_pair
from benchmarks.slow_link.__main__ import num_timed_rounds
from benchmarks.slow_link.methods import METHODS
from localsgd_jax.planning.cost_model import Link, all_reduce_time

COMMAND = [sys.executable, "-m", "benchmarks.slow_link", "gpt", "--tiny"]
needs_namespaces = pytest.mark.skipif(
    network.missing_requirements() is not None,
    reason=f"no network namespaces: {network.missing_requirements()}",
)


def network_devices():
    return sorted(path.name for path in pathlib.Path("/sys/class/net").iterdir())


def network_namespaces():
    """Returns the network namespaces of all processes."""
    found = set()
    for path in pathlib.Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(path))
        except OSError:
            continue  # The process has ended.
    return found


@needs_namespaces
@pytest.mark.full
def test_slow_link_takes_longer_and_gives_equal_losses(tmp_path):
    devices_before = network_devices()
    done = subprocess.run(
        [*COMMAND, "--mbit", "1000", "1", "--seconds", "1", "--out", str(tmp_path)]
        + ["--methods", "Local SGD, H = 16", "Local SGD, H = 16, overlapped"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "slow_link.json").read_text())["rows"]
    time_of = {(row["method"], row["mbit"]): row["ms/step"] for row in rows}
    assert len(time_of) == 4
    # 100 kB take most of a second at 1 Mbit/s, whatever the machine.
    for method in {method for method, _ in time_of}:
        assert time_of[method, 1] > 2 * time_of[method, 1000]
    assert (tmp_path / "slow_link.png").stat().st_size > 10_000
    assert network_devices() == devices_before


@needs_namespaces
@pytest.mark.full
def test_killed_measurement_leaves_no_network_behind(tmp_path):
    before = network_namespaces()
    with subprocess.Popen(
        [*COMMAND, "--out", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as run:
        deadline = time.monotonic() + 60
        while len(network_namespaces() - before) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        created = network_namespaces() - before
        run.send_signal(signal.SIGKILL)
    assert len(created) == 3
    deadline = time.monotonic() + 20
    while network_namespaces() & created and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not network_namespaces() & created


@needs_namespaces
def test_network_requires_its_own_namespace():
    with pytest.raises(RuntimeError, match="reexec_in_namespace"):
        network.Network(2)


@needs_namespaces
def test_requires_root():
    script = (
        "from benchmarks.slow_link import network; "
        "print(network.missing_requirements())"
    )
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    if "Permission denied" in done.stderr:
        pytest.skip("another user cannot read this Python")
    assert done.stdout == "creating network namespaces requires root\n", done.stderr


class NoisyPair:
    """Workers on a known link, with correct times from `min_repeats` on."""

    link = Link(latency=1e-4, bandwidth=1e8)

    def __init__(self, min_repeats):
        self.min_repeats, self.requests = min_repeats, []

    def all_reduce_seconds(self, repeats):
        self.requests.append(repeats)
        if repeats < self.min_repeats:
            return [3e-3, 2e-3, 1e-3]
        sizes = tasks.all_reduce_sizes(tiny=True)
        return [all_reduce_time(self.link, worker_pair.WORKERS, size) for size in sizes]


class UnthrottledNetwork:
    """Network without rate limits."""

    def throttle(self, mbit):
        assert mbit is None


@pytest.mark.parametrize("min_repeats", [1, 4, 256])
def test_link_is_measured_with_more_repeats_until_the_fit_succeeds(min_repeats):
    pair = NoisyPair(min_repeats)
    link = worker_pair.measure_link(pair, UnthrottledNetwork(), None, tiny=True)
    assert link == pytest.approx(pair.link)
    attempts = [n for n in worker_pair.REPEATS if n <= min_repeats]
    assert pair.requests == [n for n in attempts for _ in range(3)]


def test_link_measurement_raises_if_noise_remains():
    with pytest.raises(ValueError, match="times must increase with the sizes"):
        worker_pair.measure_link(NoisyPair(512), UnthrottledNetwork(), None, tiny=True)


def test_hidden_fraction_is_relative_to_the_hideable_time():
    common = {"model": "m", "mbit": 100, "s to target": 1.0, "local ms/step": 10.0}
    rows = [
        common | {"method": "x", "ms/step": 30.0},
        common | {"method": "x, overlapped", "ms/step": 22.0},
    ]
    assert results.with_ratios(rows)[1]["hidden fraction"] == pytest.approx(0.8)


def test_hidden_fraction_is_reported():
    def row(method, mbit, step):
        columns = {"model": "mlp", "method": method, "mbit": mbit, "ms/step": step}
        return columns | {"local ms/step": 10.0, "s to target": None}

    rows = [row("DiLoCo", 100, 18.0), row("DiLoCo, overlapped", 100, 14.0)]
    rows += [row("DiLoCo", 10, 101.0), row("DiLoCo, overlapped", 10, 99.0)]
    fractions = [row["hidden fraction"] for row in results.with_ratios(rows)]
    assert fractions == [None, 0.5, None, None]


def test_speedup_is_relative_to_an_average_at_every_step():
    common = {"model": "m", "mbit": 10, "local ms/step": 1.0, "ms/step": 2.0}
    rows = [
        common | {"method": "every step", "s to target": 6.0},
        common | {"method": "DiLoCo", "s to target": 2.0},
        common | {"method": "Local SGD, H = 4", "s to target": None},
    ]
    assert [row["speedup"] for row in results.with_ratios(rows)] == [1, 3, None]


def test_rows_not_measured_again_are_kept(tmp_path):
    def row(method, mbit, step):
        return {"model": "mlp", "method": method, "mbit": mbit, "ms/step": step}

    earlier = [row("every step", 10, 1), row("every step", 100, 2), row("other", 10, 3)]
    (tmp_path / "slow_link.json").write_text(json.dumps({"rows": earlier}))
    rows = [row("every step", 10, 4)]
    assert results.earlier_rows(tmp_path, "rows", rows) == earlier[1:]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("max_rounds", keep([0, 1, 6, 64], fast={6}))
def test_fragments_are_timed_equally_often(name, max_rounds):
    method = METHODS[name]
    num_timed = num_timed_rounds(method, max_rounds) - 1  # The first is not timed.
    assert num_timed % method.fragments == 0
    assert num_timed >= (3 if method.overlapped else 1)
    assert num_timed < max(max_rounds, 1 + 3 * method.fragments)
