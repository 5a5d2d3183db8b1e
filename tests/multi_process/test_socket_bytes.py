"""Bytes sent by the sockets of real processes, against the compiled collectives."""

import sys

import pytest
from harness.process_jobs import run


@pytest.mark.full
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="TCP counters are those of Linux"
)
@pytest.mark.parametrize(
    "processes", [2, pytest.param(4, marks=pytest.mark.slow)], ids=str
)
def test_socket_bytes_equal_bytes_of_collectives(processes):
    expected = 2 * (processes - 1) / processes * 600 * 600 * 4
    assert expected > 1e6
    for row in run("socket_bytes_worker.py", processes):
        assert row["collectives"] == [0, expected]
        assert row["sent"] == [expected, expected]
        assert abs(row["round"] / expected - 1) < 0.05
        # A heartbeat of the coordination service may fall into a local step.
        assert row["local"] < 0.001 * expected
