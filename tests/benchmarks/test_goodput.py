"""Goodput under failures: the simulation against closed forms and the library."""

import math

import numpy as np
import pytest

from benchmarks import goodput
from benchmarks.goodput import Setting


def test_a_pause_that_is_interrupted_starts_again():
    times = np.array([0.0, 1.0, 5.0])
    assert goodput.paused_share(times, pause=2.0, horizon=10.0) == pytest.approx(0.5)


def test_lockstep_and_elastic_have_their_closed_forms():
    setting, rng = Setting(repair=600.0), np.random.default_rng(0)
    rate = setting.chips / setting.chip_mtbf
    lockstep = goodput.restarting(rng, setting.chips, setting, 1e6)
    assert lockstep == pytest.approx(math.exp(-rate * setting.restart), abs=0.01)
    missing = setting.slice_chips * setting.repair / setting.chip_mtbf
    elastic = math.exp(-2 * rate * setting.reconfiguration) * (1 - missing)
    found = goodput.elastic(rng, setting.chips, setting, 1e6)
    assert found == pytest.approx(elastic, abs=0.01)


@pytest.mark.full
def test_virtual_clock_has_the_goodput_of_the_model():
    row = goodput.clock_goodput(8, None, rounds=40, seed=0)
    expected = row["goodput of the model"]
    assert row["goodput on the clock"] == pytest.approx(expected, abs=0.03)
