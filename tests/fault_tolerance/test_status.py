"""Status of a process after a synchronisation."""

import numpy as np
import pytest

from localsgd_jax.fault_tolerance.report import RoundReport, unpack
from localsgd_jax.fault_tolerance.status import Status, next_status


def make_reports(is_done, stop_requested):
    """Returns the unpacked reports of several processes."""
    rows = [
        RoundReport(4, 0.5, done, stop, {"loss": 1.0}).pack()
        for done, stop in zip(is_done, stop_requested, strict=True)
    ]
    return unpack(np.stack(rows), ["loss"])


@pytest.mark.parametrize(
    "is_done, stop_requested, process, status",
    [
        ([0, 0, 0], [0, 0, 0], 0, Status.RUNNING),
        ([0, 1, 0], [0, 0, 0], 0, Status.DONE),
        ([1, 1, 1], [0, 0, 1], 0, Status.DONE),
        ([1, 0, 0], [1, 0, 0], 2, Status.PREEMPTED),
        ([0, 0, 0], [1, 1, 1], 2, Status.PREEMPTED),
        ([0, 0, 0], [0, 1, 0], 2, Status.LEAVING),
        ([0, 0, 0], [0, 1, 0], 0, Status.RUNNING),
        ([0, 0, 0], [0, 1, 1], 0, Status.TOO_FEW),
    ],
)
def test_next_status(is_done, stop_requested, process, status):
    reports = make_reports(is_done, stop_requested)
    assert next_status([0, 2, 3], reports, process, min_processes=2) is status


def test_exit_codes():
    assert {status.name: status.exit_code for status in Status} == {
        "RUNNING": 0,
        "DONE": 0,
        "PREEMPTED": 143,
        "TOO_FEW": 75,
        "LEAVING": 143,
    }


def test_report_survives_packing():
    report = RoundReport(3, 0.25, 1, 0, {"b": 2.0, "a": 1.0})
    rows = np.stack([report.pack(), report._replace(steps=5).pack()])
    unpacked = unpack(rows, ["b", "a"])
    assert unpacked.steps.tolist() == [3, 5]
    assert unpacked.compute_seconds.tolist() == [0.25, 0.25]
    assert unpacked.is_done.tolist() == [1, 1]
    assert {name: x.tolist() for name, x in unpacked.metrics.items()} == {
        "a": [1, 1],
        "b": [2, 2],
    }
