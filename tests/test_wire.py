"""Real processes: what the kernel sends is what the ledger says."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


def run(processes):
    """Runs as many processes as workers; returns what each has counted."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, "one_process.py", coordinator, str(processes)]
    started = [
        subprocess.Popen(
            [*command, str(process)],
            cwd=HERE,
            env=os.environ | {"PYTHONPATH": str(HERE.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        ended = [one.communicate(timeout=120) for one in started]
    finally:
        for one in started:
            one.kill()
    lines = [line for out, _ in ended for line in out.splitlines() if line[:1] == "{"]
    assert len(lines) == processes, [err[-2000:] for _, err in ended]
    return [json.loads(line) for line in lines]


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="TCP counters are those of Linux"
)
@pytest.mark.parametrize(
    "processes", [2, pytest.param(4, marks=pytest.mark.slow)], ids=str
)
def test_bytes_on_the_sockets_agree_with_the_ledger(processes):
    expected = 2 * (processes - 1) / processes * 600 * 600 * 4
    assert expected > 1e6
    for row in run(processes):
        assert row["ledger"] == [0, expected]
        assert row["sent"] == [expected, expected]
        assert abs(row["round"] / expected - 1) < 0.05
        # A heartbeat of the coordination service may fall into a local step.
        assert row["local"] < 0.001 * expected
