"""The model of the speedup, against known numbers."""

import math

import pytest
from harness.experiment_files import assert_figures, read_csv

from localsgd_jax.experiments.paper import speedup_model


def decimals(number):
    """Number of decimals with which a known number is given."""
    return len(str(number).partition(".")[2])


def test_table_contains_known_values(tmp_path):
    text = speedup_model.run(tmp_path, rho=25.0, epsilon=1e-6)
    table = {
        (r["model"], float(r["epsilon"]), int(r["period"]), int(r["workers"])): float(
            r["speedup"]
        )
        for r in read_csv(tmp_path / "speedup-theory.csv")
    }
    known = {(1, 2): 0.039, (1, 16): 0.021, (16, 2): 0.485, (16, 16): 0.334}
    known |= {(64, 16): 1.258, (256, 16): 4.07, (256, 128): 4.96}
    known |= {(1024, 16): 9.24, (1024, 128): 17.8, (1024, 1024): 20.1}
    for (period, workers), speedup in known.items():
        for model in speedup_model.MODELS:
            found = table[model, 0.0, period, workers]
            assert found == pytest.approx(speedup, abs=0.6 * 10 ** -decimals(speedup))
    # Growth 4Kε(1 + H + H²K) = 4 · 2 · 10⁻⁶ · (1 + 512 + 2 · 512²) for the variant.
    root = (1 + math.sqrt(1 + 8e-6 * (513 + 2 * 512**2))) / 2
    expected = 2 / root / (1 + 50 / 512)
    assert table["with 4K", 1e-6, 512, 2] == pytest.approx(expected, rel=1e-4)
    assert table["published", 1e-6, 512, 2] == pytest.approx(1.631, abs=6e-4)
    assert "11 of 11" in text and "S(1024) = 20.1" in text
    assert_figures(tmp_path, "speedup-theory")


def test_other_rho_has_no_reference(tmp_path):
    text = speedup_model.run(tmp_path, rho=1.0, epsilon=1e-5)
    assert "independently" not in text and "H/(2ρ) = 512" in text
