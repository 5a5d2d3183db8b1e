"""The linear-speedup experiment, with small T."""

import pytest
from harness.experiment_files import assert_figures, read_csv

from localsgd_jax.experiments.paper import linear_speedup
from localsgd_jax.experiments.paper.linear_speedup import LinearSpeedupConfig


def test_small_experiment(tmp_path):
    config = LinearSpeedupConfig(64, steps=60, period=4, workers=(1, 4), batches=(2,))
    text = linear_speedup.run(tmp_path, config)
    rows = read_csv(tmp_path / "linear-speedup.csv")
    pairs = [(row["batch"], row["workers"]) for row in rows]
    assert pairs == [("2", "1"), ("2", "4")]
    for row in rows:
        scale = int(row["workers"]) * int(row["batch"]) * 60
        assert float(row["scaled_error"]) == pytest.approx(scale * float(row["error"]))
    assert "b = 2: error × K constant within 1.3 ×" in text
    assert "K = T/(bH²) = 1.88" in text
    assert_figures(tmp_path, "linear-speedup")


def test_findings_name_the_end_of_the_linear_speedup():
    config = LinearSpeedupConfig(workers=(1, 2, 4, 8), batches=(1, 4))
    rows = [
        {"batch": batch, "workers": workers, "scaled_error": 0.5 * factor}
        for batch, factors in ((1, (1, 1.2, 1.4, 1.25)), (4, (1, 0.9, 1.29, 1.3)))
        for workers, factor in zip(config.workers, factors, strict=True)
    ]
    observed = [finding.observed for finding in linear_speedup._findings(config, rows)]
    assert observed == [
        "constant up to K = 2; 1.40 × at K = 4",
        "constant up to K = 8; within the tolerance at every K",
    ]
