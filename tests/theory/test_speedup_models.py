"""Speedup models: the numbers of the paper, limits and the corrected root."""

import numpy as np
import pytest

from localsgd_jax import theory

RATIO = 25  # ρ
POWERS = [2**i for i in range(16)]


@pytest.mark.parametrize(
    ("period", "workers", "expected"),
    [(1, 2, "0.039"), (1, 16, "0.021"), (16, 2, "0.485"), (16, 16, "0.334")]
    + [(64, 16, "1.258"), (256, 16, "4.07"), (256, 128, "4.96")]
    + [(1024, 16, "9.24"), (1024, 128, "17.8"), (1024, 1024, "20.1")],
)
def test_speedup_of_communication_alone(period, workers, expected):
    digits = len(expected.split(".")[1])
    assert f"{theory.speedup(workers, period, RATIO):.{digits}f}" == expected
    assert f"{theory.corrected_speedup(workers, period, RATIO):.{digits}f}" == expected


@pytest.mark.parametrize(
    ("accuracy", "workers", "expected", "best"),
    [(1e-4, 2, "0.955", 64), (1e-4, 4, "0.982", 128), (1e-4, 16, "0.750", 128)]
    + [(1e-5, 2, "1.336", 128), (1e-5, 8, "1.932", 256), (1e-5, 16, "1.855", 256)]
    + [(1e-6, 2, "1.631", 512), (1e-6, 16, "3.959", 512), (1e-8, 2, "1.913", 2048)]
    + [(1e-8, 16, "10.2", 2048), (1e-8, 128, "17.7", 2048), (5e-3, 2, "0.357", 32)],
)
def test_best_period_and_its_speedup(accuracy, workers, expected, best):
    speedup = max((theory.speedup(workers, h, RATIO, accuracy), h) for h in POWERS)
    digits = len(expected.split(".")[1])
    assert (f"{speedup[0]:.{digits}f}", speedup[1]) == (expected, best)


def test_coarse_accuracy_allows_no_speedup():
    assert (
        max(theory.speedup(k, h, RATIO, 5e-3) for k in POWERS[1:] for h in POWERS) < 1
    )


@pytest.mark.parametrize("period", [1, 16, 1024])
def test_speedup_limit_for_many_workers(period):
    limit = period / (2 * RATIO)
    assert theory.speedup(10**9, period, RATIO) == pytest.approx(limit, rel=1e-4)


@pytest.mark.parametrize("model", [theory.speedup, theory.corrected_speedup])
def test_speedup_with_free_communication_is_linear(model):
    assert [model(k, 8, ratio=0) for k in (1, 2, 64)] == [1, 2, 64]
    assert model(1, 8, RATIO) == 1


@pytest.mark.parametrize("accuracy", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize(("workers", "period"), [(1, 1), (2, 1), (4, 32), (64, 1000)])
def test_corrected_speedup_solves_the_corollary(workers, period, accuracy):
    # εT² − T/K − (1 + H)/K − H² = 0
    roots = np.roots([accuracy, -1 / workers, -(1 + period) / workers - period**2])
    expected = 1 / accuracy / roots.max() / (1 + 2 * RATIO * (workers - 1) / period)
    corrected = theory.corrected_speedup(workers, period, RATIO, accuracy)
    assert corrected == pytest.approx(expected, rel=1e-9)
