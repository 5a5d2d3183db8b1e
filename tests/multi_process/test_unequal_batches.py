"""Processes with batches of different sizes."""

import numpy as np
import pytest
from harness.process_jobs import run
from programs.unequal_batches_worker import STEPS, batches


@pytest.mark.full
def test_processes_weigh_by_their_examples():
    """With H = 1, each round is an SGD step on the examples of all processes."""
    found = run("unequal_batches_worker.py", 3)
    data, w = [batches(process) for process in range(3)], np.zeros(4)
    for step in range(STEPS):
        union = np.concatenate([rows[step][0] for rows in data]).astype(np.float64)
        w = w - 0.1 * (w - union.mean(0))
    for row in found:
        np.testing.assert_allclose(row["params"], w, rtol=1e-5, atol=1e-6)
