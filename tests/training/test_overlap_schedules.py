"""Schedules of the programs of `train`, compiled for two slices of TPU v5e."""

import json
import os
import subprocess
import sys

import pytest
from harness.paths import PROGRAMS, PYTHONPATH
from harness.selection import in_full

from localsgd_jax.analysis import compile_targets


def compiled_schedules(rule):
    """Compiles in a child process, since the compiler must load before JAX starts."""
    if not compile_targets.is_compiler_installed("tpu"):
        pytest.skip(compile_targets.install_command("tpu"))
    done = subprocess.run(
        [sys.executable, "overlap_schedules.py", rule],
        cwd=PROGRAMS,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "rule, programs, transfers",
    [
        # Steps and period of each program of `train` that synchronises.
        in_full("overlap", [(64, 64)], [4]),
        in_full("overlap_short", [(64, 8)], [4]),
        in_full("delay", [(64, 64), (5, 5)], [0, 4]),
        in_full("streaming", [(45, 45), (5, 5)] * 2, [0, 2] * 2),
    ],
)
def test_local_steps_overlap_with_transfers_between_slices(rule, programs, transfers):
    """Send and receive of each leaf; in a gated step nothing runs beside them."""
    found = compiled_schedules(rule)
    assert [(p["steps"], p["period"]) for p in found["train"]] == programs
    assert [len(p["transfers"]) for p in found["train"]] == transfers
    for program in found["train"]:
        assert program["conditionals"] == 0
        assert all(x["beside_local_steps"] for x in program["transfers"])
    assert found["gated"]["conditionals"] > 0 and len(found["gated"]["transfers"]) == 4
    assert not any(x["beside_local_steps"] for x in found["gated"]["transfers"])


@pytest.mark.full
def test_a_rule_without_delay_hides_nothing():
    (program,) = compiled_schedules("diloco")["train"]
    assert len(program["transfers"]) == 4
    assert not any(x["beside_local_steps"] for x in program["transfers"])
