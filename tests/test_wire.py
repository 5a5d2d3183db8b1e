"""Real processes: what the kernel sends is what the ledger says."""

import sys

import pytest
from jobs import run


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="TCP counters are those of Linux"
)
@pytest.mark.parametrize(
    "processes", [2, pytest.param(4, marks=pytest.mark.slow)], ids=str
)
def test_bytes_on_the_sockets_agree_with_the_ledger(processes):
    expected = 2 * (processes - 1) / processes * 600 * 600 * 4
    assert expected > 1e6
    for row in run("one_process.py", processes):
        assert row["ledger"] == [0, expected]
        assert row["sent"] == [expected, expected]
        assert abs(row["round"] / expected - 1) < 0.05
        # A heartbeat of the coordination service may fall into a local step.
        assert row["local"] < 0.001 * expected
