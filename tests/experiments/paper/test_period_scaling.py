"""The period-scaling experiment, with small T."""

import pytest
from harness.experiment_files import assert_figures, read_csv

from localsgd_jax.experiments.paper import period_scaling
from localsgd_jax.experiments.paper.period_scaling import (
    MINI_BATCH,
    PERIODS,
    PeriodScalingConfig,
)


def test_small_experiment(tmp_path):
    config = PeriodScalingConfig((64, 400), workers=4, dimension=128)
    text = period_scaling.run(tmp_path, config)
    table = read_csv(tmp_path / "period-scaling.csv")
    rows = {(r["growth"], int(r["steps"])): r for r in table}
    assert [int(rows[growth, 400]["period"]) for growth in PERIODS] == [1, 10, 44, 100]
    assert [int(rows[growth, 400]["rounds"]) for growth in PERIODS] == [400, 40, 10, 4]
    for (growth, steps), row in rows.items():
        base = float(rows[MINI_BATCH, steps]["error"])
        assert float(row["ratio"]) == pytest.approx(float(row["error"]) / base)
        assert (float(row["ratio"]) == 1) == (growth == MINI_BATCH)
    assert float(rows["T/K", 400]["ratio"]) > float(rows["sqrt(T/K)", 400]["ratio"])
    assert "H = sqrt(T/K): error within 1.3 × of mini-batch SGD at every T" in text
    assert_figures(tmp_path, "period-scaling")
    assert period_scaling.run(tmp_path, config) == text
    with pytest.raises(ValueError, match="steps must be "):
        period_scaling.run(tmp_path, config._replace(steps=(64,)))


def test_findings_count_steps_within_the_tolerance():
    config = PeriodScalingConfig((100, 1000))
    rows = [
        {"growth": growth, "steps": steps, "rounds": steps // 10, "ratio": ratio}
        for growth, ratios in zip(
            list(PERIODS)[1:], [(1.2, 1.31), (1.3, 1.1), (2.0, 3.0)], strict=True
        )
        for steps, ratio in zip(config.steps, ratios, strict=True)
    ]
    observed = [finding.observed for finding in period_scaling._findings(config, rows)]
    starts = ["within at 1 of 2", "within at 2 of 2", "within at 0 of 2"]
    assert [text[:16] for text in observed] == starts
    assert "ratio 1.20 at T = 100 to 1.31 at T = 1000, 10 to 10 times" in observed[0]
